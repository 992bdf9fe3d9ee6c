"""What the branches share is computed once and changes nothing."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from pml import FAULTY, NO_INDICES_TUPLE, SIZE, loss_names, make_loss, make_miner
from pytorch_metric_learning import distances, losses, miners
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from s2sd_pml import S2SDLoss, sharing
from s2sd_pml.branch import Branch, metric_loss

B = 12
LABELS = torch.arange(B) // 3 % 6
PLAIN = [
    name
    for name in loss_names()
    if name not in FAULTY and name not in {"VICRegLoss", "SelfSupervisedLoss"}
]


def draw(dtype=torch.float64):
    return torch.randn(B, SIZE, dtype=dtype, requires_grad=True)


def both(loss, miner, dtype=torch.float64, labels=LABELS):
    """Value and gradient of a branch and of its parts without it."""
    x = draw(dtype)
    plain = copy.deepcopy([loss, miner])
    branch = Branch(nn.Identity(), loss, miner)
    results = []
    for compute in (lambda z: metric_loss(*plain, z, labels), lambda z: shared(branch, z, labels)):
        z = x.detach().clone().requires_grad_()
        torch.manual_seed(3)
        value = compute(z)
        value.backward()
        results.append((value.detach(), z.grad))
    return results


def shared(branch, z, labels):
    listed = sharing.SharedIndices(labels, z.device)
    return branch.metric_loss(z, labels, None, None, None, listed)[0]


@pytest.mark.parametrize(
    ("name", "mined"),
    [(n, False) for n in PLAIN] + [(n, True) for n in PLAIN if n not in NO_INDICES_TUPLE],
)
def test_every_loss_gives_the_same_with_and_without(name, mined):
    labels = None if name == "ManifoldLoss" else LABELS
    miner = make_miner("MultiSimilarityMiner") if mined else None
    for a, b in zip(*both(make_loss(name).double(), miner, labels=labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "distance",
    [
        distances.LpDistance(power=2),
        distances.LpDistance(normalize_embeddings=False, p=1),
        distances.CosineSimilarity(power=3),
        distances.CosineSimilarity(collect_stats=True),
        distances.DotProductSimilarity(),
        distances.SNRDistance(),
    ],
    ids=lambda d: type(d).__name__,
)
def test_every_distance_keeps_its_settings(distance):
    loss = losses.ContrastiveLoss(*((1, 0) if distance.is_inverted else (0, 1)), distance=distance)
    miner = miners.BatchHardMiner(distance=copy.deepcopy(distance))
    for a, b in zip(*both(loss, miner), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def products(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * B * B * SIZE)


@pytest.mark.skipif(torch.__version__ < "2.2", reason="FlopCounterMode fails at miners before")
def test_miner_and_loss_need_one_product_and_the_gradient_one_more():
    x = draw()
    branch = Branch(nn.Identity(), losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner())
    value = []
    assert products(lambda: value.append(shared(branch, x, LABELS))) == 1
    assert products(value[0].backward) == 1


def test_the_teacher_needs_no_product_of_its_own():
    x = draw(torch.float32)
    branch = Branch(nn.Identity(), losses.MultiSimilarityLoss(), None)
    _, cosines = branch.metric_loss(x, LABELS)
    unit = nn.functional.normalize(x.detach(), dim=1)
    torch.testing.assert_close(cosines, unit @ unit.T)
    assert not cosines.requires_grad
    for distance in (distances.LpDistance(), distances.CosineSimilarity(power=2)):
        branch = Branch(nn.Identity(), losses.TripletMarginLoss(distance=distance), None)
        assert branch.metric_loss(x, LABELS)[1] is None


class Writes(losses.TripletMarginLoss):
    """A loss that writes into the matrix that it got."""

    def compute_loss(self, embeddings, labels, *args):
        self.distance(embeddings).mul_(0)
        return super().compute_loss(embeddings, labels, *args)


def test_a_loss_that_writes_into_the_matrix_harms_no_one():
    loss = Writes(distance=distances.CosineSimilarity())
    for a, b in zip(*both(loss, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class OfAHalf(losses.BaseMetricLossFunction):
    """A loss that compares a part of the batch last."""

    def compute_loss(self, embeddings, labels, *args):
        value = self.distance(embeddings[::2]).mean()
        return {"loss": {"losses": value, "indices": None, "reduction_type": "already_reduced"}}


def test_a_part_of_the_batch_is_not_taken_for_the_batch():
    branch = Branch(nn.Identity(), OfAHalf(distance=distances.CosineSimilarity()), None)
    assert branch.metric_loss(draw(), LABELS)[1] is None


def test_nothing_is_kept_after_the_loss():
    branch = Branch(nn.Identity(), losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner())
    x = draw()
    value, cosines = branch.metric_loss(x, LABELS)
    kept = [weakref.ref(x), weakref.ref(cosines)]
    del x, value, cosines
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    with pytest.raises(Exception, match="labels"):
        branch.metric_loss(draw(), LABELS[:3])
    assert branch.loss.distance._made is None
    copied = pickle.loads(pickle.dumps(copy.deepcopy(branch)))
    assert copied.loss.distance is copied.miner.distance


def test_the_base_loss_and_its_miner_are_left_as_they_are():
    loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    loss_func = S2SDLoss(loss, miner, feature_dim=5, head_dims=(7,))
    assert type(loss.distance) is type(miner.distance) is distances.CosineSimilarity
    branch = loss_func.branches["head_7"]
    assert isinstance(branch.loss.distance, distances.CosineSimilarity)
    assert branch.loss.distance is branch.miner.distance


def test_a_miner_of_another_distance_keeps_it():
    branch = Branch(nn.Identity(), losses.TripletMarginLoss(), miners.MultiSimilarityMiner())
    assert type(branch.miner.distance) is distances.CosineSimilarity


def test_a_distance_that_a_factory_shares_is_not_changed():
    distance = distances.CosineSimilarity()
    S2SDLoss(
        lambda dim: losses.ContrastiveLoss(1, 0, distance=distance),
        embedding_size=4,
        feature_dim=5,
        head_dims=(7, 8),
    )
    assert type(distance) is distances.CosineSimilarity


@pytest.mark.parametrize(
    ("loss", "lister", "calls"),
    [
        (losses.ContrastiveLoss(), "get_all_pairs_indices", 1),
        (losses.TripletMarginLoss(), "get_all_triplets_indices", 1),
        (losses.MarginLoss(), "get_all_triplets_indices", 1),
        (losses.TripletMarginLoss(triplets_per_anchor=2), "get_random_triplet_indices", 4),
    ],
)
def test_all_pairs_and_triplets_are_listed_once(monkeypatch, loss, lister, calls):
    made, original = [], getattr(lmu, lister)
    monkeypatch.setattr(lmu, lister, lambda *a, **k: made.append(1) or original(*a, **k))
    loss_func = S2SDLoss(loss, feature_dim=5, head_dims=(7, 8, 9))
    loss_func(draw(torch.float32), LABELS, features=torch.randn(B, 5))
    assert len(made) == calls


class Coarse(losses.ContrastiveLoss):
    """Takes two classes for one: pairs listed by the labels that it was given are not its own."""

    def forward(self, embeddings, labels, *args, **kwargs):
        return super().forward(embeddings, labels // 2, *args, **kwargs)


class TakesNoIndices(losses.TripletMarginLoss):
    def forward(self, embeddings, labels):
        return super().forward(embeddings, labels)


@pytest.mark.parametrize("make", [Coarse, TakesNoIndices])
def test_a_loss_with_a_forward_of_its_own_lists_for_itself(make):
    loss_func = S2SDLoss(make(), feature_dim=5, head_dims=(7,))
    x, features = draw(torch.float32), torch.randn(B, 5)
    loss_func(x, LABELS, features=features)
    branch = loss_func.branches["head_7"]
    assert torch.equal(loss_func.components["base"], make()(x, LABELS).detach())
    expected = make()(branch.head(features), LABELS).detach()
    torch.testing.assert_close(loss_func.components["aux_7"], expected)
