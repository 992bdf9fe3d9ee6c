"""What errors and warnings of the capture advise is followed here, and works."""

import itertools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import F_DIM, B, images, labels
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import FeatureCapture, S2SDLoss
from s2sd_pml.errors import MissingFeaturesError


class NetVLAD(nn.Module):
    def __init__(self, clusters=3):
        super().__init__()
        self.assign = nn.Conv2d(F_DIM, clusters, 1)
        self.centroids = nn.Parameter(torch.rand(clusters, F_DIM))

    def forward(self, x):
        x = F.normalize(x, dim=1)
        weights = self.assign(x).flatten(2).softmax(dim=1)
        residual = x.flatten(2)[None].permute(1, 0, 2, 3) - self.centroids[None, :, :, None]
        vlad = F.normalize((residual * weights[:, :, None]).sum(dim=-1), dim=2)
        return F.normalize(vlad.flatten(1), dim=1)


class GeM(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1) * 3)

    def forward(self, x):
        return F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), x.shape[-2:]).pow(1 / self.p).flatten(1)


class MixVPR(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.channels, self.rows = nn.Linear(F_DIM, 5), nn.Linear(16, 2)

    def forward(self, x):
        x = x.flatten(2)
        x = x + self.mix(x)
        x = self.channels(x.permute(0, 2, 1)).permute(0, 2, 1)
        return F.normalize(self.rows(x).flatten(1), dim=-1)


class AttentionPooling(nn.Module):
    """As CLIP's: positions first, then the batch."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(F_DIM, 2)

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x])
        return self.attention(x[:1], x, x)[0].squeeze(0)


AGGREGATORS = {
    "NetVLAD": (NetVLAD, 3 * F_DIM),
    "GeM": (GeM, F_DIM),
    "MixVPR": (MixVPR, 10),
    "attention": (AttentionPooling, F_DIM),
}


def train(loss_func, model, x, **given):
    model.zero_grad()
    loss_func.zero_grad()
    loss = loss_func(model(x), labels(), **given)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for m in (model, loss_func) for p in m.parameters())]


@pytest.mark.parametrize("variant", [S2SDLoss.msdf, S2SDLoss.msdfa])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregation_layer_behind_a_trunk_is_named_as_the_embedder(name, variant):
    make, width = AGGREGATORS[name]
    trunk, aggregator, x = nn.Conv2d(3, F_DIM, 1), make(), images()
    model = nn.Sequential(trunk, aggregator, nn.Linear(width, 6))
    made = {"feature_dim": F_DIM, "head_dims": (8,), "feature_distill_delay": 0}
    loss_func = variant(losses.NTXentLoss(), trunk=trunk, **made)
    try:
        train(loss_func, model, x)
    except MissingFeaturesError as error:
        advised = re.search(
            r"instead of trunk=: embedder=<the layer>, feature_dim=(\d+)\..*features=", str(error)
        )
        assert int(advised[1]) == F_DIM
    else:
        assert name in ("GeM", "MixVPR")
    torch.manual_seed(0)
    loss_func = variant(losses.NTXentLoss(), embedder=aggregator, **made)
    explicit = train(loss_func, model, x, features=trunk(x))
    loss_func.step = 0
    for a, b in zip(train(loss_func, model, x), explicit, strict=True):
        torch.testing.assert_close(a, b)


def test_operations_that_move_rows_and_back_are_of_unknown_order():
    trunk, embedder = nn.Linear(5, F_DIM), nn.Linear(F_DIM, 4)
    capture = FeatureCapture(trunk, "output")
    features = trunk(torch.randn(B, 5))
    twice = features[:, None].transpose(0, 1).transpose(0, 1)[:, 0]
    with pytest.raises(
        MissingFeaturesError, match=r"Their order is not known.*embedder=.*features=\.\.\."
    ):
        capture.features_of(embedder(twice))


def test_attention_after_the_embedder():
    embedder, attention = nn.Linear(5, 4), nn.MultiheadAttention(4, 1, batch_first=True)
    capture = FeatureCapture(embedder)
    made = embedder(torch.randn(B, 5))[:, None].expand(B, 3, 4)
    embeddings = attention(made, made, made)[0][:, 0]
    with pytest.raises(MissingFeaturesError, match=r"order.*Pass features=\.\.\."):
        capture.features_of(embeddings)


def mlp(*widths):
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


class Net(nn.Module):
    def __init__(self, trunk, fc):
        super().__init__()
        self.trunk, self.fc = trunk, fc

    def forward(self, x):
        return self.fc(self.trunk(x))


POOL = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
WHOLE_MODELS = {
    "trunk and fc": (nn.Sequential(mlp(9, 20), nn.Linear(20, 6)), (9,)),
    "a module of both": (Net(mlp(9, 20, 20), nn.Linear(20, 6)), (9,)),
    "wrapped": (nn.DataParallel(Net(mlp(9, 20), nn.Linear(20, 6))), (9,)),
    "on images": (nn.Sequential(nn.Conv2d(3, 8, 1), POOL, nn.Linear(8, 6)), (3, 4, 4)),
}
EMBEDDERS = {
    "linear": (nn.Linear(9, 6), (9,)),
    "mlp": (mlp(9, 20, 6), (9,)),
    "norm first": (nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 6)), (9,)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(9, 6)), (9,)),
    "mlp in a module": (nn.Sequential(mlp(9, 20, 20, 6)), (9,)),
    "of a map": (nn.Sequential(nn.Conv2d(9, 8, 1), POOL, nn.Linear(8, 6)), (9, 2, 2)),
    "without parameters": (nn.Identity(), (9,)),
}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_a_whole_model_named_as_the_embedder_is_warned_of_once(name):
    model, shape = WHOLE_MODELS[name]
    capture = FeatureCapture(model)
    embeddings = model(torch.randn(B, *shape))
    with pytest.warns(UserWarning, match=r"raw input.*embedder=<model>\[-1\].*features=") as caught:
        capture.features_of(embeddings)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture.features_of(model(torch.randn(B, *shape)))
        capture.remove()
        last = model.module.fc if name == "wrapped" else list(model.children())[-1]
        capture = FeatureCapture(last)
        capture.features_of(model(torch.randn(B, *shape)))


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedder_behind_a_frozen_trunk_is_not_warned_of(name):
    embedder, shape = EMBEDDERS[name]
    after = nn.Linear(shape[0], 6) if name == "without parameters" else nn.Identity()
    capture = FeatureCapture(embedder)
    x = torch.randn(B, *shape)
    if name == "without parameters":
        x = after(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture.features_of(embedder(x) * 1)


def test_a_lora_layer_behind_a_frozen_trunk_is_not_warned_of():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 6)),
        peft.LoraConfig(target_modules=["1"], r=2, init_lora_weights=False),
    )
    capture = FeatureCapture(model.base_model.model[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture.features_of(model(torch.randn(B, 5))).shape == (B, 9)


def test_features_of_a_trained_trunk_or_given_ones_are_not_warned_of():
    model, x = nn.Sequential(mlp(9, 20), nn.Linear(20, 6)), torch.randn(B, 9)
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model, feature_dim=9, head_dims=(8,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_func(model(x), labels(), features=x)
        loss_func(model(nn.Linear(9, 9)(x)), labels())
    with pytest.warns(UserWarning, match="raw input"):
        loss_func(model(x), labels())
