"""The metric losses of all spaces at once are those of PML, space by space."""

import copy
import random
import time
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import F_DIM, D, cosine_block, plain_s2sd
from hypothesis import given, settings
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import nn

from s2sd_pml import S2SDLoss, stacking
from s2sd_pml.errors import BatchError, S2SDWarning
from s2sd_pml.stacking import PAIR_LOSSES, ROW_LOSSES, agrees_with_pml, stackable, stacked_losses

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LOSSES = [*ROW_LOSSES, *PAIR_LOSSES]
few, many = settings(deadline=None, max_examples=40), settings(deadline=None, max_examples=300)

# --- cases ----------------------------------------------------------------------------------------

number = st.floats(0.1, 2)
SETTINGS = {
    losses.MultiSimilarityLoss: {"alpha": number, "beta": st.floats(1, 50), "base": number},
    losses.GeneralizedLiftedStructureLoss: {"neg_margin": number, "pos_margin": number},
    losses.CircleLoss: {"m": st.floats(0.1, 0.6), "gamma": st.floats(1, 256)},
    losses.SupConLoss: {"temperature": number},
    losses.ContrastiveLoss: {"neg_margin": number, "pos_margin": st.floats(0, 1)},
    losses.SignalToNoiseRatioContrastiveLoss: {"neg_margin": number, "pos_margin": st.floats(0, 1)},
    losses.NTXentLoss: {"temperature": number},
    losses.TupletMarginLoss: {"margin": st.floats(0, 10), "scale": st.floats(1, 64)},
    losses.LiftedStructureLoss: {"neg_margin": number, "pos_margin": st.floats(0, 1)},
    losses.TripletMarginLoss: {
        "margin": number,
        "swap": st.booleans(),
        "smooth_loss": st.booleans(),
    },
}
COSINES = st.builds(
    distances.CosineSimilarity, p=st.sampled_from([2, 2, 1]), power=st.sampled_from([1, 1, 2])
)
SNR = st.builds(distances.SNRDistance, normalize_embeddings=st.booleans())
DISTANCES = st.one_of(
    COSINES,
    SNR,
    st.builds(distances.DotProductSimilarity, normalize_embeddings=st.booleans()),
    st.builds(
        distances.LpDistance,
        p=st.sampled_from([1, 2]),
        power=st.sampled_from([1, 2]),
        normalize_embeddings=st.booleans(),
    ),
)
ACCEPTED = {
    losses.CircleLoss: COSINES,
    losses.TupletMarginLoss: st.builds(distances.CosineSimilarity),
    losses.SignalToNoiseRatioContrastiveLoss: SNR,
}
ONE_REDUCER = st.one_of(
    st.builds(reducers.MeanReducer),
    st.builds(reducers.SumReducer),
    st.builds(reducers.AvgNonZeroReducer),
    st.builds(reducers.ThresholdReducer, low=number),
    st.builds(reducers.ThresholdReducer, high=number),
    st.builds(reducers.ThresholdReducer, low=st.floats(0.1, 0.5), high=number),
)
REDUCERS = st.one_of(
    st.none(),
    ONE_REDUCER,
    st.builds(
        reducers.MultipleReducers,
        st.dictionaries(st.sampled_from(["loss", "pos_loss", "neg_loss"]), ONE_REDUCER, max_size=2),
        st.one_of(st.none(), ONE_REDUCER),
    ),
)
LABELS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),  # uneven classes
    st.integers(2, 4).flatmap(lambda n: st.integers(1, 3).map(lambda k: [*range(n)] * k)),
    st.integers(1, 12).map(lambda batch: [7] * batch),
    st.integers(1, 12).map(lambda batch: [*range(batch)]),
    st.integers(2, 12).map(lambda batch: [0, *range(batch - 1)]),  # a single pair
)
GIVEN = st.sampled_from(["none", "none", "pairs", "triplets", "empty", "a positive", "one each"])


@st.composite
def lone_losses(draw, kind):
    """A loss of that type, with every part that it accepts."""
    arguments = {name: draw(values) for name, values in SETTINGS[kind].items()}
    distance = draw(st.one_of(st.none(), ACCEPTED.get(kind, DISTANCES)))
    return kind(**arguments, distance=distance, reducer=draw(REDUCERS))


def given_pairs(how, y):
    """An indices_tuple from outside."""
    a1, p, a2, n = lmu.get_all_pairs_indices(y)
    if how == "none":
        return None
    if how == "triplets":
        triplets = lmu.get_all_triplets_indices(y)
        chosen = torch.rand(len(triplets[0])) < 0.5
        return tuple(index[chosen] for index in triplets)
    share = {"pairs": 0.5, "empty": 0.0}.get(how)
    if share is None:
        return a1[:1], p[:1], *((a2[:1], n[:1]) if how == "one each" else (a2[:0], n[:0]))
    i, j = torch.rand(len(a1)) < share, torch.rand(len(a2)) < share
    return a1[i], p[i], a2[j], n[j]


def draw_spaces(batch, widths, dtype=torch.float64):
    return [torch.randn(batch, width, dtype=dtype, requires_grad=True) for width in widths]


def with_gradients(values, spaces):
    """The values, and the gradients of a sum of them with a weight each.

    The weights are at most 1: SupConLoss divides by the smallest of all numbers.
    """
    total = (values / torch.arange(1, len(values) + 1, dtype=values.dtype)).sum()
    return [values.detach(), *torch.autograd.grad(total, spaces, materialize_grads=True)]


def pml(loss, miner, spaces, y, pairs=None):
    """The losses by PML's own calls, one space after the other."""
    values = []
    for x in spaces:
        own_loss, own_miner = copy.deepcopy((loss, miner))
        mined = pairs if own_miner is None else own_miner(x, y)
        values.append(own_loss(x, y, mined).reshape(()))
    return torch.stack(values)


def check(loss, miner, y, widths, seed, how="none"):
    torch.manual_seed(seed)
    y = torch.tensor(y)
    spaces, pairs = draw_spaces(len(y), widths), given_pairs(how, y)
    copies = [copy.deepcopy((loss, miner)) for _ in spaces]
    assert stackable(*zip(*copies, strict=True))
    found = stacked_losses(*zip(*copies, strict=True), spaces, y, pairs)
    want = pml(loss, miner, spaces, y, pairs)
    assert found.shape == want.shape
    for a, b in zip(with_gradients(found, spaces), with_gradients(want, spaces), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


CASE = {
    "y": LABELS,
    "widths": st.lists(st.integers(2, 9), min_size=1, max_size=4),
    "seed": st.integers(0, 10_000),
}
MULTI_SIMILARITY = {
    "loss": lone_losses(losses.MultiSimilarityLoss),
    "epsilon": st.sampled_from([0.1, 0.0, 0.5, 10.0, -0.2]),
    "mined_by": st.one_of(st.none(), DISTANCES),
    **CASE,
}


def check_mined(loss, epsilon, mined_by, **case):
    check(loss, miners.MultiSimilarityMiner(epsilon, distance=mined_by or loss.distance), **case)


# --- the same as PML ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@few
@given(data=st.data(), how=GIVEN, **CASE)
def test_every_loss_is_that_of_pml(kind, data, **case):
    check(data.draw(lone_losses(kind)), None, **case)


@settings(few, max_examples=60)
@given(**MULTI_SIMILARITY)
def test_mined_pairs_are_those_of_pml(**case):
    check_mined(**case)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", LOSSES)
@many
@given(data=st.data(), how=GIVEN, **CASE)
def test_every_loss_is_that_of_pml_at_length(kind, data, **case):
    check(data.draw(lone_losses(kind)), None, **case)


@pytest.mark.matrix
@many
@given(**MULTI_SIMILARITY)
def test_mined_pairs_are_those_of_pml_at_length(**case):
    check_mined(**case)


def test_the_list_names_every_setting_of_every_part():
    """Each number that a part holds is compared between spaces."""
    ignored = {"training", "collect_stats", "embedding_reg_weight"}
    for kind, names in stacking.KNOWN.items():
        arguments = {reducers.ThresholdReducer: (0, 1), reducers.MultipleReducers: ({},)}
        held = vars(kind(*arguments.get(kind, ()))).items()
        held = {name for name, value in held if isinstance(value, (int, float, str))}
        parts = {"distance", "reducer", "embedding_regularizer", "reducers", "default_reducer"}
        assert held - ignored <= set(names), kind
        assert set(names) - parts <= held | {"high"}, kind  # None of AvgNonZeroReducer


def mined_masks(loss, miner, spaces, y):
    blocks = [miner.distance(x.detach()) for x in spaces]
    pairs = stacking._pairs(loss, blocks[0], y, None)
    masks = [stacking._mined(miner, block, *pairs) for block in blocks]
    return tuple(torch.stack(kind) for kind in zip(*masks, strict=True))


@pytest.mark.parametrize("epsilon", [-0.1, 0.0, 0.1, 3.0])
@pytest.mark.parametrize("kind", [distances.CosineSimilarity, distances.LpDistance])
def test_ties_are_mined_as_pml_mines_them(kind, epsilon):
    """Rows that occur twice: similarities of positive and negative pairs are the same number."""
    miner, y = miners.MultiSimilarityMiner(epsilon, distance=kind()), torch.arange(12) % 5 // 2
    spaces = [torch.eye(4, 3 + k, dtype=torch.float64).repeat(3, 1) for k in range(3)]
    positive, negative = mined_masks(None, miner, spaces, y)
    assert positive.any()
    for k, x in enumerate(spaces):
        a1, p, a2, n = miner(x, y)
        assert {*zip(a1.tolist(), p.tolist(), strict=True)} == {
            *map(tuple, positive[k].nonzero().tolist())
        }
        assert {*zip(a2.tolist(), n.tolist(), strict=True)} == {
            *map(tuple, negative[k].nonzero().tolist())
        }


def test_a_space_with_a_single_mined_pair_is_none_and_its_neighbour_is_not_touched():
    y = torch.tensor([0, 0, 1])
    close = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]], dtype=torch.float64)
    loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(epsilon=-1e-4)
    counts = [[len(i) for i in miner(x, y)[::2]] for x in (close, close.roll(1, 0))]
    assert max(counts[0]) > 1
    for x in (close, close.roll(1, 0), torch.randn(3, 4).double(), torch.randn(3, 5).double()):
        spaces = [x.clone().requires_grad_(), *draw_spaces(3, [3, 4])]
        found = stacked_losses([loss] * 3, [miner] * 3, spaces, y)
        torch.testing.assert_close(found, pml(loss, miner, spaces, y), **EXACT)


@pytest.mark.parametrize("bounds", [{"low": 0.25}, {"high": 0.25}, {"low": 0.25, "high": 0.5}])
def test_a_value_at_the_threshold_is_left_out(bounds):
    """All rows are the same, so that each triplet costs the margin, exactly."""
    loss = losses.TripletMarginLoss(margin=0.25, reducer=reducers.ThresholdReducer(**bounds))
    spaces = [torch.ones(6, width, dtype=torch.float64) for width in (2, 3)]
    found = stacked_losses([loss] * 2, [None] * 2, spaces, torch.arange(6) // 2)
    assert found.tolist() == [0, 0] == pml(loss, None, spaces, torch.arange(6) // 2).tolist()
    loss = losses.TripletMarginLoss(margin=0.25, reducer=reducers.ThresholdReducer(0.2, 0.3))
    found = stacked_losses([loss] * 2, [None] * 2, spaces, torch.arange(6) // 2)
    assert found.tolist() == [0.25, 0.25]


def test_known_cosines_are_used_for_distances_that_follow_from_them():
    y, spaces = torch.arange(26) // 2, draw_spaces(26, [3, 4])
    other = draw_spaces(26, [5, 6])
    known = cosine_block(other)
    for distance, of in (
        (distances.CosineSimilarity(), other),
        (distances.CosineSimilarity(power=2), spaces),
        (distances.CosineSimilarity(p=1), spaces),
        (distances.DotProductSimilarity(), spaces),
        (distances.LpDistance(), other),
        (distances.LpDistance(power=2), spaces),
        (distances.LpDistance(p=1), spaces),
        (distances.LpDistance(normalize_embeddings=False), spaces),
    ):
        loss = losses.NTXentLoss(distance=distance)
        found = stacked_losses([loss] * 2, [None] * 2, spaces, y, block=known)
        torch.testing.assert_close(found, pml(loss, None, of, y), **EXACT)
    miner = miners.MultiSimilarityMiner(distance=distances.LpDistance())
    loss = losses.MultiSimilarityLoss()
    found = stacked_losses([loss] * 2, [miner] * 2, spaces, y, block=cosine_block(spaces))
    torch.testing.assert_close(found, pml(loss, miner, spaces, y), **EXACT)


@pytest.mark.parametrize("rows", [25, 26, 40])  # torch.cdist subtracts up to 25
@pytest.mark.parametrize(
    "kind", [losses.ContrastiveLoss, losses.TripletMarginLoss, losses.LiftedStructureLoss]
)
def test_default_distances_of_few_and_of_many_rows(kind, rows):
    y, spaces = torch.arange(rows) % 7, draw_spaces(rows, [8, 16, 12])
    found = with_gradients(stacked_losses([kind()] * 3, [None] * 3, spaces, y), spaces)
    assert_same(found, with_gradients(pml(kind(), None, spaces, y), spaces))


def test_equal_rows_and_rows_of_zeros_have_the_distances_and_gradients_of_pml():
    """PML's own distances of equal rows are 0 but for rounding, so that none is left out as 0."""
    loss = losses.ContrastiveLoss(0, 1.3, reducer=reducers.MeanReducer())
    y, spaces = torch.arange(40) // 4, [x.detach() for x in draw_spaces(40, [8, 12])]
    for x in spaces:
        x[1], x[2], x[5], x[6] = x[0], 2 * x[0], 0, 0
        x.requires_grad_()
    found = with_gradients(stacked_losses([loss] * 2, [None] * 2, spaces, y), spaces)
    want = with_gradients(pml(loss, None, spaces, y), spaces)
    assert_same(found, want, rtol=1e-6, atol=1e-6)


def test_a_distance_of_zero_counts_as_zero():
    """AvgNonZeroReducer leaves it out."""
    assert stacking._euclidean(torch.ones(1, 3, 3)).eq(0).all()
    block = torch.ones(1, 3, 3, requires_grad=True)
    assert torch.autograd.grad(stacking._euclidean(block).sum(), block)[0].eq(0).all()


def test_a_cosine_that_does_not_normalise_any_more():
    loss, y, spaces = losses.SupConLoss(), torch.arange(8) // 2, draw_spaces(8, [3, 4])
    loss.distance.normalize_embeddings = False
    found = stacked_losses([loss] * 2, [None] * 2, spaces, y)
    torch.testing.assert_close(found, pml(loss, None, spaces, y), **EXACT)


# --- within S2SDLoss ------------------------------------------------------------------------------

DIMS = (5, 9)


def make(loss, miner=None, **kwargs):
    kwargs = {"feature_dim": F_DIM, "head_dims": DIMS, "feature_distill_delay": 1, **kwargs}
    return S2SDLoss(loss, miner, **kwargs).double()


def batch(y):
    y = torch.as_tensor(y)
    return y, *draw_spaces(len(y), [D, F_DIM])


def step(loss_func, y, embeddings, features, *args, **kwargs):
    """The value, and the gradients of embeddings, features and heads."""
    value = loss_func(embeddings, y, *args, features=features, **kwargs)
    return differentiated(loss_func, value, embeddings, features)


def differentiated(loss_func, value, embeddings, features):
    leaves = [embeddings, features, *loss_func.parameters()]
    return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]


def assert_same(found, want, **tolerance):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))


class Calls:
    """How often the losses of a forward were computed at once."""

    def __init__(self, monkeypatch):
        self.count = 0
        original = stacking.stacked_losses

        def counted(*args, **kwargs):
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(stacking, "stacked_losses", counted)

    def during(self, function):
        before = self.count
        return function(), self.count - before


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@settings(few, max_examples=60)
@given(
    data=st.data(),
    kind=st.sampled_from(LOSSES),
    y=LABELS,
    how=GIVEN,
    mined=st.booleans(),
    chunk_size=st.sampled_from([None, None, 4]),
    seed=st.integers(0, 10_000),
)
def test_s2sd_is_the_equation_with_pml_in_each_space(data, kind, y, how, mined, chunk_size, seed):
    torch.manual_seed(seed)
    loss, miner = data.draw(lone_losses(kind)), None
    if mined and kind is losses.MultiSimilarityLoss:
        miner, how = miners.MultiSimilarityMiner(), "none"
    loss_func = make(loss, miner, chunk_size=chunk_size)
    assert loss_func._stacks
    y, embeddings, features = batch(y)
    pairs = given_pairs(how, y)
    for k in range(2):
        want = plain_s2sd(loss_func, embeddings, features, y, k, pairs).reshape(())
        want = differentiated(loss_func, want, embeddings, features)
        assert_same(step(loss_func, y, embeddings, features, pairs), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_stacked_or_not_is_the_same(kind, calls):
    loss_func = make(kind(), feature_distill_delay=0)
    y, embeddings, features = batch(torch.arange(12) // 3)
    results = []
    for loss_func._stacks in (True, False):
        found, count = calls.during(lambda: step(loss_func, y, embeddings, features))
        assert count == loss_func._stacks
        results.append([*found, *loss_func.components.values()])
    assert_same(*results)


@pytest.mark.skipif(
    not hasattr(losses.SupConLoss, "_assert_either_pos_or_neg"), reason="PML 2.8 takes them"
)
def test_pairs_that_are_positive_and_negative_are_refused_as_pml_refuses_them():
    loss_func = make(losses.SupConLoss())
    y, embeddings, features = batch(torch.arange(8) // 2)
    both = tuple(torch.tensor(i) for i in ([0, 2], [1, 3], [0, 2], [1, 4]))
    for loss_func._stacks in (True, False):
        with pytest.raises(BatchError, match="either be positive or negative"):
            step(loss_func, y, embeddings, features, both)


def test_one_space_needs_no_stack():
    assert not make(losses.NTXentLoss(), head_dims=())._stacks


# --- what is not stacked --------------------------------------------------------------------------


class Trivial(losses.NTXentLoss):
    pass


class Doubled(losses.ContrastiveLoss):
    def pos_calc(self, *args):
        return 2 * super().pos_calc(*args)


class OtherDistance(distances.LpDistance):
    def compute_mat(self, *args):
        return 3 * super().compute_mat(*args)


class OtherReducer(reducers.MeanReducer):
    def element_reduction(self, losses, *args):
        return losses.max()


class OtherMiner(miners.MultiSimilarityMiner):
    def mine(self, *args):
        return tuple(i[:5] for i in super().mine(*args))


def replaced(name, of="loss"):
    def change(loss_func):
        for every in loss_func._losses.losses:
            part = every if of == "loss" else getattr(every, of)
            original = getattr(part, name)
            setattr(part, name, lambda *args, original=original, **kw: original(*args, **kw))

    return change


def hooked(loss_func):
    def hook(module, args, value):
        return 2 * value

    for every in loss_func._losses.losses:
        every.register_forward_hook(hook)


def pre_hooked(loss_func):
    def hook(module, args):
        return 3 * args[0], *args[1:]

    for every in loss_func._losses.losses:
        every.distance.register_forward_pre_hook(hook)


def backward_hooked(loss_func):
    loss_func.loss.register_full_backward_hook(lambda module, grads, _: None)


def changed(name, value, of=None, head=5):
    def change(loss_func):
        loss = loss_func.branches[f"head_{head}"].loss
        setattr(loss if of is None else getattr(loss, of), name, value)

    return change


def watched(part):
    def change(loss_func):
        of = loss_func if part == "miner" else loss_func.loss
        (of.loss if part == "loss" else getattr(of, part)).collect_stats = True

    return change


def ms():
    return losses.MultiSimilarityLoss()


UNSTACKED = {
    "a trivial subclass": (Trivial, None, None),
    "a subclass": (Doubled, None, None),
    "a subclass of the distance": (lambda: losses.NTXentLoss(distance=OtherDistance()), None, None),
    "a subclass of the reducer": (lambda: losses.NTXentLoss(reducer=OtherReducer()), None, None),
    "a subclass of the miner": (ms, OtherMiner, None),
    "another miner": (ms, miners.BatchHardMiner, None),
    "a miner of another loss": (losses.NTXentLoss, miners.MultiSimilarityMiner, None),
    "compute_loss replaced": (losses.NTXentLoss, None, replaced("compute_loss")),
    "_compute_loss replaced": (ms, None, replaced("_compute_loss")),
    "forward replaced": (ms, None, replaced("forward")),
    "mat_based_loss replaced": (ms, None, replaced("mat_based_loss")),
    "pos_calc replaced": (losses.ContrastiveLoss, None, replaced("pos_calc")),
    "compute_mat replaced": (ms, None, replaced("compute_mat", "distance")),
    "element_reduction replaced": (ms, None, replaced("element_reduction", "reducer")),
    "a forward hook": (ms, None, hooked),
    "a forward pre-hook": (ms, None, pre_hooked),
    "a backward hook": (ms, None, backward_hooked),
    "collect_stats of the loss": (ms, None, watched("distance")),
    "collect_stats of the reducer": (losses.ContrastiveLoss, None, watched("reducer")),
    "collect_stats of the miner": (ms, miners.MultiSimilarityMiner, watched("miner")),
    "a regularizer": (
        lambda: losses.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer()),
        None,
        None,
    ),
    "PerAnchorReducer": (
        lambda: losses.NTXentLoss(reducer=reducers.PerAnchorReducer()),
        None,
        None,
    ),
    "ClassWeightedReducer": (
        lambda: losses.NTXentLoss(reducer=reducers.ClassWeightedReducer(torch.rand(4).double())),
        None,
        None,
    ),
    "MultipleReducers with another": (
        lambda: losses.NTXentLoss(
            reducer=reducers.MultipleReducers({"loss": OtherReducer()}),
        ),
        None,
        None,
    ),
    "a subclass of MultipleReducers": (
        lambda: losses.NTXentLoss(
            reducer=type("Own", (reducers.MultipleReducers,), {})({}),
        ),
        None,
        None,
    ),
    "another setting of a loss": (losses.TripletMarginLoss, None, changed("margin", 0.7)),
    "another setting of a distance": (losses.NTXentLoss, None, changed("power", 2, "distance")),
    "another distance": (losses.NTXentLoss, None, changed("distance", distances.LpDistance())),
    "another reducer": (losses.NTXentLoss, None, changed("reducer", reducers.SumReducer())),
    "another threshold": (losses.TripletMarginLoss, None, changed("low", 0.1, "reducer", 9)),
    "another epsilon": (
        ms,
        miners.MultiSimilarityMiner,
        lambda loss_func: setattr(loss_func.branches["head_9"].miner, "epsilon", 1.0),
    ),
    "a miner fewer": (
        ms,
        miners.MultiSimilarityMiner,
        lambda loss_func: setattr(loss_func.branches["head_9"], "miner", None),
    ),
    "a margin that learns": (
        losses.TripletMarginLoss,
        None,
        lambda loss_func: [
            setattr(of, "margin", torch.tensor(0.3).double()) for of in loss_func._losses.losses
        ],
    ),
    "a loss without a row a sample": (losses.NCALoss, None, None),
    "a loss with parameters": (lambda: losses.ProxyAnchorLoss(4, D), None, None),
}


@pytest.mark.parametrize("case", UNSTACKED.values(), ids=UNSTACKED)
def test_what_is_not_stacked_is_computed_space_by_space(case, calls):
    make_loss, make_miner, change = case
    with warnings.catch_warnings():
        warnings.simplefilter("error", S2SDWarning)
        loss_func = make(make_loss(), make_miner and make_miner(), feature_distill_delay=0)
    if change is not None:
        assert loss_func._stacks
        change(loss_func)
    y, embeddings, features = batch(torch.arange(12) // 3)
    want = plain_s2sd(loss_func, embeddings, features, y, 0)
    want = differentiated(loss_func, want, embeddings, features)
    found, count = calls.during(lambda: step(loss_func, y, embeddings, features))
    assert count == 0
    assert_same(found, want)


def test_a_loss_whose_stats_are_collected_is_called_itself(calls):
    y, embeddings, features = batch(torch.arange(12) // 3)
    for part in ("loss", "distance", "reducer"):
        loss_func = make(losses.MultiSimilarityLoss())
        loss = loss_func.branches["head_9"].loss
        (loss if part == "loss" else getattr(loss, part)).collect_stats = True
        assert calls.during(lambda f=loss_func: step(f, y, embeddings, features))[1] == 0


def test_triplets_drawn_at_random_are_drawn_for_each_space(calls):
    loss = losses.TripletMarginLoss(triplets_per_anchor=3)
    assert not stackable([loss] * 2, [None] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", S2SDWarning)
        loss_func = make(loss, feature_distill_delay=0)
    y, embeddings, features = batch(torch.arange(12) // 3)
    torch.manual_seed(5)
    want = plain_s2sd(loss_func, embeddings, features, y, 0)
    torch.manual_seed(5)
    value, count = calls.during(lambda: loss_func(embeddings, y, features=features))
    assert count == 0
    torch.testing.assert_close(value, want, **EXACT)


@pytest.mark.parametrize("case", ["ref_emb", "ref_labels", "labels", "miner and pairs", "mixed"])
def test_calls_that_are_not_stacked(case, calls):
    loss, miner, kwargs = losses.MultiSimilarityLoss(), None, {}
    if case == "miner and pairs":
        miner = miners.MultiSimilarityMiner()
    loss_func = make(loss, miner, feature_distill_delay=0)
    y, embeddings, features = batch(torch.arange(12) // 3)
    heads = [branch.head for branch in loss_func.branches.values()]
    pairs, called = None, [embeddings, y]
    if case in ("ref_emb", "ref_labels"):
        ref, ref_features = draw_spaces(12, [D, F_DIM])
        kwargs = {"ref_emb": ref, "ref_features": ref_features, "ref_labels": y.flip(0)}
        if case == "ref_labels":  # those of the batch itself
            kwargs = {"ref_emb": embeddings, "ref_labels": y}
    if case in ("labels", "miner and pairs"):
        pairs = given_pairs("pairs", y)
        kwargs["indices_tuple"] = pairs
    if case == "labels":
        called[1] = None
    if case == "mixed":
        loss_func.branches.float()

    def plain(loss, x, miner, ref):
        mined = pairs if miner is None or x is embeddings else miner(x, y)
        references = {} if ref is None else {"ref_emb": ref, "ref_labels": kwargs["ref_labels"]}
        return loss(x, called[1], mined, **references)

    spaces = [embeddings, *(h(features.to(next(h.parameters()).dtype)) for h in heads)]
    refs = [None] * 3
    if case == "ref_emb":
        refs = [ref, *(h(ref_features) for h in heads)]
    elif case == "ref_labels":
        refs = spaces
    parts = zip(*loss_func._losses, spaces, refs, strict=True)
    want = [plain(loss, x, miner, ref) for loss, miner, x, ref in parts]
    _, count = calls.during(lambda: loss_func(*called, features=features, **kwargs))
    assert count == 0
    found = [loss_func.components[name] for name in ("base", "aux_5", "aux_9")]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case == "mixed" else EXACT
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b.detach().double(), **tolerance)


# --- held to PML at construction ------------------------------------------------------------------


def test_the_check_at_construction_draws_nothing_and_touches_nothing():
    loss = losses.ContrastiveLoss(distance=distances.LpDistance(p=1))
    miner = miners.MultiSimilarityMiner()
    agrees_with_pml(losses.MultiSimilarityLoss(), miner)  # what the first call loads
    before = [torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    held = copy.deepcopy([vars(loss), vars(miner), vars(loss.distance)])
    started = time.perf_counter()
    for _ in range(3):
        assert agrees_with_pml(loss, None)
        assert agrees_with_pml(losses.MultiSimilarityLoss(), miner)
    assert (time.perf_counter() - started) / 6 < 0.3  # some milliseconds on a machine at rest
    after = [torch.random.get_rng_state(), np.random.get_state()[1], random.getstate()]
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]
    assert str(held) == str([vars(loss), vars(miner), vars(loss.distance)])


@pytest.mark.parametrize(
    "where",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "meta", "autocast"],
)
def test_a_loss_can_be_built_anywhere(where):
    with warnings.catch_warnings():
        warnings.simplefilter("error", S2SDWarning)
        for kind in (losses.MultiSimilarityLoss, losses.NTXentLoss):
            with where():
                loss_func = S2SDLoss(kind(), feature_dim=F_DIM, head_dims=DIMS)
            assert loss_func._stacks


def whole_batch(original):
    """A later release whose loss of a row depends on all rows."""

    def changed(self, mat, *masks):
        return original(self, mat / mat.detach().std(), *masks)

    return changed


def summed_up(original):
    """A later release whose sum of exponentials depends on the size of the matrix."""

    def changed(x, *args, **kwargs):
        return original(x, *args, **kwargs) / len(x)

    return changed


def fails(original):
    def changed(*args, **kwargs):
        raise TypeError("masks are lists now")

    return changed


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner])
@pytest.mark.parametrize("later", [whole_batch, summed_up])
def test_a_later_pml_that_differs_is_noticed(later, miner, monkeypatch, calls):
    of, name = {
        whole_batch: (losses.MultiSimilarityLoss, "_compute_loss"),
        summed_up: (lmu, "logsumexp"),
    }[later]
    monkeypatch.setattr(of, name, later(getattr(of, name)))
    with pytest.warns(S2SDWarning, match="MultiSimilarityLoss of pytorch-metric-lea") as warned:
        loss_func = make(ms(), miner and miner())
    assert [w.filename for w in warned] == [__file__]
    y, embeddings, features = batch(torch.arange(12) // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(2):
            want = plain_s2sd(loss_func, embeddings, features, y, k)
            found, count = calls.during(lambda: step(loss_func, y, embeddings, features))
            assert count == 0
            torch.testing.assert_close(found[0], want.detach(), **EXACT)


def test_a_later_pml_whose_parts_have_other_names_is_noticed(monkeypatch):
    """Only the call for all spaces fails: the loss itself works."""
    monkeypatch.setattr(stacking, "_by_rows", fails(None))
    with pytest.warns(S2SDWarning):
        assert not make(ms())._stacks


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_differs_in_one_space_is_noticed(which, monkeypatch):
    original = stacking.stacked_losses

    def detached(losses, miners, spaces, *args, **kwargs):
        spaces = [x.detach() * 1 if k == which else x for k, x in enumerate(spaces)]
        ghosts = [0 * x.sum() for x in spaces]
        return original(losses, miners, spaces, *args, **kwargs) + sum(ghosts)

    monkeypatch.setattr(stacking, "stacked_losses", detached)
    assert not agrees_with_pml(losses.NTXentLoss(), None)


def test_layers_and_other_losses_are_not_stackable():
    assert not stackable([nn.Identity()] * 2, [None] * 2)
    assert stackable([losses.NTXentLoss()] * 2, [None] * 2)
    assert not stackable([losses.NTXentLoss(), losses.SupConLoss()], [None] * 2)
    assert not stackable([losses.SupConLoss(), losses.NTXentLoss()], [None] * 2)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("kind", stacking.ROW_LOSSES)
def test_rows_in_pieces_that_fit_the_cache_are_the_same(kind, mined, monkeypatch):
    if mined and kind is not losses.MultiSimilarityLoss:
        pytest.skip("is not mined for all spaces at once")
    loss, miner = kind(), miners.MultiSimilarityMiner() if mined else None
    y, spaces = torch.arange(14) // 3, draw_spaces(14, [3, 4, 5])
    monkeypatch.setattr(stacking, "CACHED", 14 * 4)  # four rows, across the borders of spaces
    found = stacked_losses([loss] * 3, [miner] * 3, spaces, y)
    torch.testing.assert_close(found, pml(loss, miner, spaces, y), **EXACT)
