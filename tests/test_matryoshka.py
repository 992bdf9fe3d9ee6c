"""Matryoshka students: the equation, what is refused, and everything that must work with them."""

import copy
import io
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from helpers import F_DIM, B, D, labels, plain_kl
from hypothesis import given, settings
from pytorch_metric_learning import distances, losses, miners
from test_loss_step import reads
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError, BatchError, UnsupportedLossError

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from launches import launches

EXACT = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
Y = labels()

LOSSES = {
    "stacked, mined": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "stacked": lambda: (losses.NTXentLoss(), None),
    "distances": lambda: (losses.ContrastiveLoss(distance=distances.LpDistance()), None),
    "triplets": lambda: (losses.TripletMarginLoss(), miners.BatchHardMiner()),
    "proxies": lambda: (losses.ProxyAnchorLoss(6, D), None),
    "classes": lambda: (losses.ArcFaceLoss(6, D), None),
    "margin": lambda: (losses.MarginLoss(learn_beta=True, num_classes=6), None),
    "memory": lambda: (losses.CrossBatchMemory(losses.NTXentLoss(), D, 64), None),
}


def make(kind="stacked, mined", dims=(2, 4), **kwargs):
    kwargs = {"feature_dim": F_DIM, "head_dims": (5, 9), "feature_distill_delay": 0, **kwargs}
    return S2SDLoss(*LOSSES[kind](), matryoshka_dims=dims, **kwargs).double()


def batch(dtype=torch.float64):
    return (
        torch.randn(B, D, dtype=dtype, requires_grad=True),
        torch.randn(B, F_DIM, dtype=dtype, requires_grad=True),
    )


def plain(loss_func, ψ, φ, y=Y, pairs=None):
    """The equation, term by term."""

    def metric(of, x, given=None):
        mined = given if of.miner is None or given is not None else of.miner(x, y)
        return of.loss(x, y, mined)

    dims = loss_func.matryoshka_dims
    spaces = [(loss_func, ψ)]
    spaces += [(loss_func.branches[f"prefix_{k}"], ψ[:, :k]) for k in dims]
    heads = [loss_func.branches[f"head_{d}"] for d in loss_func.head_dims]
    given = [pairs] + [pairs if of.miner is None else None for of, _ in spaces[1:]]
    students = sum(metric(of, x, p) for (of, x), p in zip(spaces, given, strict=True)) / len(spaces)

    def kl(teacher):
        options = (loss_func.temperature, loss_func.exclude_self)
        return sum(plain_kl(teacher, x, *options) for _, x in spaces) / len(spaces)

    total = students
    if heads:
        g = [of.head(φ) for of in heads]
        own = pairs if heads[0].miner is None else None
        aux = sum(metric(of, z, own) for of, z in zip(heads, g, strict=True)) / len(g)
        total = (students + aux) / 2 + loss_func.distill_weight * sum(map(kl, g)) / len(g)
    if loss_func.feature_distill_weight:
        total = total + loss_func.feature_distill_weight * kl(φ)
    return total


def gradients(value, loss_func, *inputs):
    wanted = [*inputs, *loss_func.parameters()]
    return torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


def assert_same(found, want, loss_func, *inputs):
    torch.testing.assert_close(found, want, **EXACT)
    pairs = zip(
        gradients(found, loss_func, *inputs), gradients(want, loss_func, *inputs), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, **EXACT)


# --- the equation ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([kind for kind in LOSSES if kind != "memory"]),
    dims=st.lists(st.integers(1, D - 1), min_size=1, max_size=4, unique=True),
    head_dims=st.sampled_from([(), (5,), (5, 9)]),
    γ_f=st.sampled_from([0.0, 4.0]),
    temperature=st.sampled_from([1.0, 0.2, 3.0]),
    exclude_self=st.booleans(),
    chunk_size=st.sampled_from([None, 5, 24]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_the_equation(kind, dims, head_dims, γ_f, seed, **kwargs):
    torch.manual_seed(seed)
    loss_func = make(
        kind, dims, head_dims=head_dims, feature_distill_weight=γ_f, distill_weight=7.0, **kwargs
    )
    ψ, φ = batch()
    found = loss_func(ψ, Y, features=φ)
    assert_same(found, plain(loss_func, ψ, φ), loss_func, ψ, φ)
    c = loss_func.components
    for k in dims:
        of = loss_func.branches[f"prefix_{k}"]
        mined = None if of.miner is None else of.miner(ψ[:, :k], Y)
        torch.testing.assert_close(c[f"base_{k}"], of.loss(ψ[:, :k], Y, mined).detach(), **EXACT)


def test_components_make_up_the_value():
    loss_func = make(teacher_weight=3.0)
    ψ, φ = batch()
    value = loss_func(ψ, Y, features=φ, teachers={"t": torch.randn(B, 3)})
    c = loss_func.components
    base = (c["base"] + c["base_2"] + c["base_4"]) / 3
    kl = 50 * c["distill"] + 50 * c["feature_distill"] + 3 * c["teacher_t"]
    torch.testing.assert_close(value, (base + c["aux"]) / 2 + kl)
    assert list(c)[4:] == [
        *("aux_5", "distill_5", "aux_9", "distill_9"),
        *("base_2", "base_4", "teacher_t"),
    ]


def test_given_pairs_serve_the_whole_embedding_and_without_miners_every_prefix():
    for kind in ("stacked, mined", "stacked", "triplets"):
        loss_func = make(kind)
        ψ, φ = batch()
        pairs = miners.MultiSimilarityMiner()(ψ, Y)
        assert_same(
            loss_func(ψ, Y, pairs, features=φ), plain(loss_func, ψ, φ, pairs=pairs), loss_func, ψ, φ
        )


def test_references_are_cut_as_the_embeddings_are():
    loss_func = make("distances", head_dims=(), feature_distill_weight=0)
    ψ, _ = batch()
    ref, ref_labels = torch.randn(8, D).double(), torch.arange(8) // 2
    found = loss_func(ψ, Y, ref_emb=ref, ref_labels=ref_labels)
    want = sum(
        loss_func.loss(ψ[:, :k], Y, ref_emb=ref[:, :k], ref_labels=ref_labels) for k in (2, 4, D)
    )
    torch.testing.assert_close(found, want / 3, **EXACT)
    assert torch.equal(loss_func(ψ, Y, ref_emb=ψ, ref_labels=Y), loss_func(ψ, Y))
    supervised = S2SDLoss(
        losses.SelfSupervisedLoss(losses.NTXentLoss()), feature_dim=F_DIM, matryoshka_dims=(3,)
    )
    ψ, φ = batch(torch.float32)
    view, ref_φ = torch.randn(B, D), torch.randn(B, F_DIM)
    supervised(ψ, view, features=φ, ref_features=ref_φ)
    want = supervised.loss(ψ[:, :3], view[:, :3]).detach()
    torch.testing.assert_close(supervised.components["base_3"], want)


@pytest.mark.parametrize("kind", LOSSES)
def test_eval_is_the_base_loss_of_the_whole_embedding(kind):
    loss_func = make(kind)
    ψ, φ = batch()
    loss_func(ψ, Y, features=φ).backward()
    keys = list(loss_func.components)
    twin = copy.deepcopy(loss_func).eval()
    mined = None if twin.miner is None else twin.miner(ψ, Y)
    with torch.no_grad():
        assert torch.equal(loss_func.eval()(ψ, Y), twin.loss(ψ, Y, mined))
    assert list(loss_func.components) == keys
    assert loss_func.components["base_2"] == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_heads_start_as_without_prefixes(kind):
    torch.manual_seed(3)
    without = make(kind, ())
    torch.manual_seed(3)
    with_prefixes = make(kind)
    for name, value in without.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(with_prefixes.state_dict()[name], value), name


def test_a_memory_of_every_size_keeps_the_prefixes():
    loss_func = make("memory", head_dims=(), feature_distill_weight=0)
    twins = [losses.CrossBatchMemory(losses.NTXentLoss(), k, 64) for k in (D, 2, 4)]
    for _ in range(4):
        ψ, _ = batch()
        want = sum(twin(ψ[:, :k], Y) for k, twin in zip((D, 2, 4), twins, strict=True)) / 3
        torch.testing.assert_close(loss_func(ψ, Y), want, **EXACT)


def test_the_prefixes_of_one_kind_of_loss_are_computed_at_once():
    assert make(head_dims=())._stacks
    assert not make("proxies")._stacks


# --- what is refused ------------------------------------------------------------------------------

LINEAR = nn.Linear(F_DIM, D)
BAD = {
    "zero": ((0,), {}, r"matryoshka_dims=\(0,\) must be"),
    "float": ((2.5,), {}, "2.5"),
    "int": (16, {}, "matryoshka_dims=16 must be a sequence"),
    "none": (None, {}, "matryoshka_dims=None"),
    "twice": ((2, 2), {}, r"\(2, 2\) repeats a dimension.*Give each once"),
    "whole": ((2, D), {}, r"size 6, is included already. Build .*matryoshka_dims=\(2,\)\)"),
    "larger": ((9, 3), {}, r"size 6, has no prefix of size 9. Build .*matryoshka_dims=\(3,\)\)"),
    "of proxies": ((D,), {"loss": losses.ProxyAnchorLoss(4, D), "embedder": None}, "included"),
    "given size": ((D,), {"embedder": None, "embedding_size": D}, "included already"),
    "unknown parameters": (
        (2,),
        {"loss": nn.PReLU(), "head_dims": ()},
        "parameter 'weight' of shape .1,. and nothing says",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes(case):
    dims, kwargs, words = BAD[case]
    kwargs = {"loss": losses.NTXentLoss(), "embedder": LINEAR, "feature_dim": F_DIM, **kwargs}
    with pytest.raises((ArgumentError, UnsupportedLossError), match=words):
        S2SDLoss(matryoshka_dims=dims, **kwargs)


@pytest.mark.parametrize(("dims", "words"), [((2, D), "included already"), ((7, 9), "size 9")])
def test_an_embedding_size_that_only_the_batch_tells(dims, words):
    loss_func = make(dims=dims)
    ψ, φ = batch()
    with pytest.raises(ArgumentError, match=words):
        loss_func(ψ, Y, features=φ)
    assert loss_func.step == 0


def test_what_the_message_suggests_works_in_any_order():
    ψ, φ = batch()
    for dims in [(4, 2), [2, 4], torch.tensor([4, 2]).tolist(), ()]:
        loss_func = make(dims=dims)
        assert loss_func.matryoshka_dims == tuple(dims)
        loss_func(ψ, Y, features=φ)
    with pytest.raises(ArgumentError, match=r"matryoshka_dims=\(3,\) cannot be assigned"):
        loss_func.matryoshka_dims = (3,)
    assert "matryoshka_dims=(4, 2)" in repr(make(dims=(4, 2)))


def test_a_narrow_reference_is_refused_by_its_shape():
    loss_func = make("distances", head_dims=(), feature_distill_weight=0)
    ψ, _ = batch()
    with pytest.raises((BatchError, RuntimeError)):
        loss_func(ψ, Y, ref_emb=torch.randn(8, 3).double(), ref_labels=Y[:8])


# --- everything else works with them --------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_copies_and_pickles(kind):
    loss_func = make(kind)
    ψ, φ = batch()
    file = io.BytesIO()
    torch.save(loss_func, file)
    file.seek(0)
    twins = [copy.deepcopy(loss_func), torch.load(file, weights_only=False), loss_func]
    values = [twin(ψ, Y, features=φ) for twin in twins]
    assert all(torch.equal(value, values[0]) for value in values)


def test_half_precision_and_autocast():
    loss_func = make().float()
    ψ, φ = batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss_func(ψ.bfloat16(), Y, features=φ.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss_func(ψ, Y, features=φ), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_step_reads_nothing_back(chunk_size):
    loss_func = make(chunk_size=chunk_size)

    def step():
        ψ, φ = batch()
        loss_func(ψ, Y, features=φ).backward()

    for _ in range(3):
        assert reads(step) == []


@pytest.mark.skipif(torch.__version__ < "2.2", reason="its profiler counts a few too many")
@pytest.mark.parametrize("kind", ["stacked, mined", "stacked"])
def test_operations_with_three_prefixes(kind):
    """What is counted depends on no size: the paper's number of heads."""

    def count(dims):
        loss_func = make(kind, dims, head_dims=(5, 7, 9, 11))
        embedder = nn.Linear(F_DIM, D).double()
        φ = torch.randn(B, F_DIM).double().requires_grad_()
        return launches(lambda: loss_func(embedder(φ), Y, features=φ).backward(), "cpu")

    assert count((1, 2, 4)) <= 1.3 * count(())
