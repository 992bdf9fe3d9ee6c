"""Where the gradient of the KL goes under --reach, and that its value is the paper's."""

from __future__ import annotations

import itertools

import pytest
import torch
import train
from pytorch_metric_learning import losses
from test_examples import SMALL
from torch import nn
from trainer import reach

from s2sd_pml import S2SDLoss

SETTINGS = {
    "head_dims": (12, 16),
    "distill_weight": 3.0,
    "feature_distill_weight": lambda step: 2.0,
    "feature_distill_delay": 1,
    "temperature": 0.3,
    "exclude_self": True,
}


class Times(losses.ContrastiveLoss):
    """A base loss whose branch losses are not multiplied."""

    factor = 1.0

    def forward(self, *args):
        return self.factor * super().forward(*args)


def gradients(make, steps=1, base_factor=1.0, **settings):
    """The loss at a step, and its gradients on trunk, embedder and heads."""
    torch.manual_seed(0)
    trunk, embedder = nn.Linear(8, 10), nn.Linear(10, 4)
    loss_func = make(Times(), embedder=embedder, **{**SETTINGS, **settings})
    loss_func.loss.factor = base_factor
    x, labels = torch.randn(12, 8), torch.arange(12) // 3
    for _ in range(steps + 1):
        loss = loss_func(embedder(trunk(x).relu()), labels)
    heads = list(loss_func.branches.parameters())
    parts = [list(trunk.parameters()), list(embedder.parameters()), heads]
    found = torch.autograd.grad(loss, [p for part in parts for p in part])
    flat = torch.cat([g.flatten() for g in found])
    return loss.detach(), flat.split([sum(p.numel() for p in part) for part in parts])


@pytest.mark.parametrize("steps", [0, 1])  # before and from the delay of the features
@pytest.mark.parametrize("exclude_self", [False, True])
def test_the_kl_reaches_the_embedder_alone(steps, exclude_self):
    loss, (trunk, embedder, heads) = gradients(
        lambda *a, **k: reach.OtherReach(*a, reach="embedder", **k),
        steps,
        exclude_self=exclude_self,
    )
    papers, (_, its_embedder, its_heads) = gradients(S2SDLoss, steps, exclude_self=exclude_self)
    _, (without, *_) = gradients(S2SDLoss, distill_weight=0.0, feature_distill_weight=0.0)
    torch.testing.assert_close(loss, papers)
    torch.testing.assert_close(trunk, without)
    torch.testing.assert_close(embedder, its_embedder)
    torch.testing.assert_close(heads, its_heads)


def test_the_heads_alone_train_the_trunk():
    def detached(*a, **k):
        return reach.OtherReach(*a, reach="detached", **k)

    loss, (trunk, embedder, heads) = gradients(detached)
    papers, (_, its_embedder, its_heads) = gradients(S2SDLoss)
    torch.testing.assert_close(loss, papers)
    torch.testing.assert_close(embedder, its_embedder)
    torch.testing.assert_close(heads, its_heads)
    _, (other, *_) = gradients(
        detached, distill_weight=0.0, feature_distill_weight=0.0, base_factor=7.0
    )
    torch.testing.assert_close(trunk, other)  # neither KL nor base loss is felt


@pytest.mark.parametrize("exclude_self", [False, True])
def test_the_kl_reaches_the_teachers(exclude_self):
    def live(*a, **k):
        return reach.OtherReach(*a, reach="teachers", **k)

    loss, (trunk, embedder, heads) = gradients(live, exclude_self=exclude_self)
    papers, theirs = gradients(S2SDLoss, exclude_self=exclude_self)
    torch.testing.assert_close(loss, papers)
    torch.testing.assert_close(embedder, theirs[1])
    assert (trunk - theirs[0]).norm() > 0.01 * theirs[0].norm()
    assert (heads - theirs[2]).norm() > 0.01 * theirs[2].norm()


@pytest.mark.slow
def test_a_run_with_another_reach(tmp_path):
    """Each learns another model, from the same losses at the first step."""
    found = {}
    for way in (None, *reach.WAYS):
        flags = ["--reach", way] if way else []
        folder = tmp_path / str(way)
        train.main([*SMALL, "--s2sd-only", "--no-report", "--feature-distill-delay", "0", *flags,
                    "--export", str(folder / "model.pt"), "--output", str(folder)])  # fmt: skip
        found[way] = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    first = next(iter(found[None]))
    assert all(torch.equal(found[None][k], found[reach.PAPERS][k]) for k in found[None])
    different = {way: weights[first] for way, weights in found.items() if way}
    for a, b in itertools.combinations(different.values(), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("way", reach.WAYS[1:])
def test_the_terms_are_stated(way):
    torch.manual_seed(0)
    embedder, x, labels = nn.Linear(10, 4), torch.randn(12, 10), torch.arange(12) // 3
    papers = S2SDLoss(losses.ContrastiveLoss(), embedder=embedder, **SETTINGS)
    other = reach.OtherReach(losses.ContrastiveLoss(), embedder=embedder, reach=way, **SETTINGS)
    other.load_state_dict(papers.state_dict())
    for _ in range(2):
        papers(embedder(x), labels)
        other(embedder(x), labels)
    assert papers.components["feature_distill"] > 0
    for name, value in papers.components.items():
        torch.testing.assert_close(other.components[name], value, msg=name)


@pytest.mark.parametrize(
    "flags", [["--variant", "msdfa"], ["--teacher", __file__], ["--baseline-only"]]
)
def test_a_reach_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--reach", "embedder", *flags])
    assert "--reach embedder is for the S2SD run" in capsys.readouterr().err
