"""Two towers, as CLIP's: one head for both is refused, and what the message suggests works."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import labels
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import BatchError

BATCH = 24


class Tower(nn.Module):
    def __init__(self, inputs, features, scale=None):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, features), nn.ReLU())
        self.embedder = nn.Linear(features, 6)
        self.scale = scale

    def forward(self, x):
        features = self.trunk(x)
        embeddings = nn.functional.normalize(self.embedder(features))
        return features, embeddings if self.scale is None else embeddings * self.scale.exp()


def towers(scale=None):
    return (Tower(9, 20, scale), torch.randn(BATCH, 9)), (
        Tower(7, 20, scale),
        torch.randn(BATCH, 7),
    )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("scale", [None, nn.Parameter(torch.zeros(()))])
@pytest.mark.parametrize("frozen", [True, False])
def test_another_embedders_references_are_refused_with_the_reason(named, scale, frozen):
    (image, x), (text, z) = towers(scale)
    image.trunk.requires_grad_(not frozen)
    where = {"embedder": image.embedder} if named else {"feature_dim": 20}
    loss_func = S2SDLoss(losses.NTXentLoss(), head_dims=(10, 15), **where)
    (φ, ψ), (φ_text, ψ_text) = image(x), text(z)
    features = {"features": φ, "ref_features": φ_text}
    for given in (features, {}) if named else (features,):
        with pytest.raises(BatchError, match="comes from another embedder.*both towers"):
            loss_func(ψ, labels(), ref_emb=ψ_text, ref_labels=labels(), **given)


@pytest.mark.parametrize(
    "loss", [losses.NTXentLoss(), losses.SelfSupervisedLoss(losses.NTXentLoss())], ids=type
)
def test_two_towers_stacked_as_the_message_suggests(loss):
    """The call in the message is run: each tower has columns of its own in the heads."""
    (image, x), (text, z) = towers()
    (features, embeddings), (ref_features, ref_emb) = image(x), text(z)
    refs = {"ref_features": ref_features, "ref_emb": ref_emb, "ref_labels": labels()}
    if isinstance(loss, losses.SelfSupervisedLoss):
        del refs["ref_labels"]
    args = (embeddings,) if "ref_labels" not in refs else (embeddings, labels())
    with pytest.raises(BatchError) as caught:
        S2SDLoss(loss, feature_dim=20, head_dims=(10,))(*args, **refs, features=features)
    (call,) = re.findall(r"columns of its own: (loss_func.*\)), built with", str(caught.value))

    loss_func = S2SDLoss(
        losses.NTXentLoss(), feature_dim=40, feature_distill_weight=0, head_dims=(10, 15)
    )
    names = {"embeddings": embeddings, "features": features, "labels": labels(), "torch": torch}
    eval(call, {**names, **refs, "loss_func": loss_func}).backward()
    for module in (image, text, *(branch.head for branch in loss_func.branches.values())):
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    stacked = loss_func.project(torch.block_diag(features, ref_features))[10]
    other = loss_func.project(torch.block_diag(features, ref_features + 1))[10]
    torch.testing.assert_close(stacked[:BATCH], other[:BATCH])  # no tower sees the other's


@pytest.mark.parametrize(
    "how", ["a second view", "a queue", "a momentum encoder", "a second trunk"]
)
def test_references_of_the_same_embedder_are_taken(how):
    """And those without a graph: it is not known where they come from."""
    tower, other_trunk = Tower(9, 20), nn.Linear(7, 20)
    momentum = copy.deepcopy(tower).requires_grad_(False)
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=tower.embedder, head_dims=(10,))
    view, y = torch.randn(BATCH, 9), labels()
    φ, ψ = (momentum if how == "a momentum encoder" else tower)(view)
    if how == "a second trunk":
        φ = other_trunk(torch.randn(BATCH, 7))
        ψ = tower.embedder(φ)
    if how == "a queue":
        φ, ψ = (torch.cat([t, torch.randn(8, t.shape[1])]) for t in (φ, ψ))
        y = torch.cat([y, y[:8]])
    _, embeddings = tower(torch.randn(BATCH, 9))
    loss_func(embeddings, labels(), ref_emb=ψ, ref_labels=y, ref_features=φ).backward()


def test_without_heads_any_references_are_taken():
    (image, x), (text, z) = towers()
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=image.embedder, head_dims=())
    loss_func(image(x)[1], labels(), ref_emb=text(z)[1], ref_labels=labels()).backward()


def test_the_page_that_the_message_names_has_the_section():
    page = Path(__file__).parent.parent / "docs" / "works-with.md"
    assert "\n## Two towers\n" in page.read_text(encoding="utf-8")
