"""Outside teachers: the equation, what a call may pass, and everything that must work with them."""

import copy
import io
import warnings

import hypothesis.strategies as st
import pytest
import torch
from helpers import F_DIM, B, D, labels, plain_kl, plain_s2sd
from hypothesis import given, settings
from pytorch_metric_learning import losses, miners
from test_loss_step import reads

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError, BatchError, S2SDWarning

EXACT = {"rtol": 1e-10, "atol": 1e-10}
Y = labels()


def make(weight=3.0, **kwargs):
    kwargs = {"feature_dim": F_DIM, "head_dims": (5, 9), "feature_distill_delay": 0, **kwargs}
    loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    return S2SDLoss(loss, miner, teacher_weight=weight, **kwargs).double()


def batch(dtype=torch.float64):
    return (
        torch.randn(B, D, dtype=dtype, requires_grad=True),
        torch.randn(B, F_DIM, dtype=dtype, requires_grad=True),
    )


def teacher(width=7, rows=B, dtype=torch.float64):
    return torch.randn(rows, width, dtype=dtype)


def gradients(value, loss_func, *inputs):
    wanted = [*inputs, *loss_func.parameters()]
    return torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


# --- the equation ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    head_dims=st.sampled_from([(), (5,), (5, 9)]),
    γ_f=st.sampled_from([0.0, 4.0]),
    temperature=st.sampled_from([1.0, 0.2, 3.0]),
    exclude_self=st.booleans(),
    chunk_size=st.sampled_from([None, 5, 24]),
    per_name=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_the_equation(
    widths, head_dims, γ_f, temperature, exclude_self, chunk_size, per_name, seed
):
    torch.manual_seed(seed)
    weights = {f"t{i}": 2.0 + 3 * i * per_name for i in range(len(widths))}
    loss_func = make(
        weights if per_name else 2.0,
        head_dims=head_dims,
        feature_distill_weight=γ_f,
        temperature=temperature,
        exclude_self=exclude_self,
        chunk_size=chunk_size,
    )
    ψ, φ = batch()
    teachers = {name: teacher(width) for name, width in zip(weights, widths, strict=True)}
    value = loss_func(ψ, Y, features=φ, teachers=teachers)
    kl = {name: plain_kl(t, ψ, temperature, exclude_self) for name, t in teachers.items()}
    want = plain_s2sd(loss_func, ψ, φ, Y, 0) + sum(weights[name] * kl[name] for name in kl)
    torch.testing.assert_close(value, want, **EXACT)
    for a, b in zip(
        gradients(value, loss_func, ψ, φ), gradients(want, loss_func, ψ, φ), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    for name, divergence in kl.items():
        torch.testing.assert_close(
            loss_func.components[f"teacher_{name}"], divergence.detach(), **EXACT
        )


def test_a_weight_may_be_a_schedule_for_all_or_one():
    calls = []

    def ramp(step):
        calls.append(step)
        return 5.0 * step

    for weight in (ramp, {"a": ramp, "b": 0.0}):
        loss_func = make(weight)
        ψ, φ = batch()
        teachers = {"b": teacher(), "a": teacher(3)}
        values = [loss_func(ψ, Y, features=φ, teachers=teachers).detach() for _ in range(3)]
        kl = loss_func.components["teacher_a"]
        if callable(weight):
            kl = kl + loss_func.components["teacher_b"]
        torch.testing.assert_close(values[1] - values[0], 5.0 * kl)
        torch.testing.assert_close(values[2] - values[0], 10.0 * kl)
    assert set(calls) == {0, 1, 2}


def test_without_heads_and_features_a_teacher_needs_neither():
    loss_func = S2SDLoss(
        losses.ContrastiveLoss(), head_dims=(), feature_distill_weight=0, teacher_weight=2.0
    )
    ψ, _ = batch()
    t = teacher()
    value = loss_func(ψ, Y, teachers={"t": t})
    want = loss_func.loss(ψ, Y) + 2.0 * plain_kl(t, ψ, 1.0, False)
    torch.testing.assert_close(value, want, **EXACT)


@pytest.mark.parametrize("variant", ["dsd", "msd", "msdf", "msdfa"])
def test_every_variant_takes_them(variant):
    maps = torch.randn(B, F_DIM, 2, 2)
    loss_func = getattr(S2SDLoss, variant)(
        losses.NTXentLoss(),
        feature_dim=F_DIM,
        teacher_weight={"t": 2.0},
        matryoshka_dims=(2,),
        **{**S2SDLoss.recipe("high-rate"), "exclude_self": False},
    )
    φ = maps if variant == "msdfa" else maps.mean(dim=(2, 3))
    loss_func(torch.randn(B, D, requires_grad=True), Y, features=φ, teachers={"t": teacher()})
    assert loss_func.components["teacher_t"] > 0
    assert loss_func.components["base_2"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_another_precision_becomes_that_of_the_embeddings(dtype, chunk_size):
    loss_func = make(chunk_size=chunk_size).float()
    ψ, φ = batch(torch.float32)
    t = teacher(dtype=dtype)
    value = loss_func(ψ, Y, features=φ, teachers={"t": t})
    assert value.dtype == torch.float32
    assert torch.equal(value, loss_func(ψ, Y, features=φ, teachers={"t": t.float()}))
    double = loss_func(ψ, Y, features=φ, teachers={"t": t.double()})
    torch.testing.assert_close(value, double)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_nan_is_propagated_and_inference_tensors_are_taken(chunk_size):
    loss_func = make(chunk_size=chunk_size)
    ψ, φ = batch()
    with torch.inference_mode():
        t = teacher()
    loss_func(ψ, Y, features=φ, teachers={"t": t}).backward()
    assert torch.isfinite(ψ.grad).all()
    odd = teacher()
    odd[3, 2] = torch.nan
    assert loss_func(ψ, Y, features=φ, teachers={"t": odd}).isnan()
    assert loss_func.components["teacher_t"].isnan()


def test_a_graph_is_cut_and_said_once():
    loss_func = make()
    ψ, φ = batch()
    t = teacher().requires_grad_()
    with pytest.warns(S2SDWarning, match=r"teachers\['ema'\] has an autograd graph") as seen:
        loss_func(ψ, Y, features=φ, teachers={"ema": t}).backward()
    assert seen[0].filename == __file__
    assert t.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_func(ψ, Y, features=φ, teachers={"ema": t})
        with torch.no_grad():
            make()(ψ, Y, features=φ, teachers={"ema": teacher()})


def test_eval_and_no_grad_need_no_teachers():
    loss_func = make()
    ψ, φ = batch()
    loss_func(ψ, Y, features=φ, teachers={"t": teacher()})
    keys = list(loss_func.components)
    with torch.no_grad():
        loss_func(ψ, Y)
    assert list(loss_func.components) == keys  # loggers want series of equal length
    assert loss_func.components["teacher_t"] == 0
    assert torch.equal(loss_func.eval()(ψ, Y), loss_func.loss(ψ, Y, loss_func.miner(ψ, Y)))


def test_the_order_of_the_names_does_not_matter():
    loss_func = make()
    ψ, φ = batch()
    a, b = teacher(), teacher(3)
    first = loss_func(ψ, Y, features=φ, teachers={"a": a, "b": b})
    assert torch.equal(first, loss_func(ψ, Y, features=φ, teachers={"b": b, "a": a}))
    assert torch.equal(first, make_like(loss_func)(ψ, Y, features=φ, teachers={"b": b, "a": a}))


def make_like(loss_func):
    twin = make()
    twin.load_state_dict(loss_func.state_dict())
    return twin


# --- what is refused ------------------------------------------------------------------------------

BAD = {
    "no dict": (3.0, teacher(), r"teachers is a Tensor. Pass a dict"),
    "a list": (3.0, [teacher()], r"teachers is a list"),
    "no names": (3.0, {3: teacher()}, r"the name 3. Names are strings: {'3': tensor}"),
    "rows": (3.0, {"t": teacher(rows=B - 1)}, rf"teachers\['t'\] has {B - 1} rows .* {B} embed"),
    "a map": (3.0, {"t": torch.randn(B, 3, 2, 2)}, r"shape \(24, 3, 2, 2\).*\.mean\(dim=\(2, 3\)"),
    "a vector": (3.0, {"t": torch.randn(B)}, r"shape \(24,\). Pass \(B, width\)"),
    "no width": (3.0, {"t": torch.randn(B, 0)}, r"shape \(24, 0\).*width above 0"),
    "integers": (3.0, {"t": torch.ones(B, 3).long()}, r"teachers\['t'\] must be.*torch.int64"),
    "no tensor": (3.0, {"t": [[1.0]] * B}, r"teachers\['t'\] must be.*list"),
    "sparse": (3.0, {"t": teacher().to_sparse()}, r"teachers\['t'\] must be a dense tensor"),
    "device": (3.0, {"t": teacher().to("meta")}, r"is on meta.*teachers\['t'\].to\('cpu'\)"),
    "no weight": (0.0, {"t": teacher()}, r"\['t'\] would teach nothing.*weight={'t': 0.0}"),
    "no weights": ({}, {"t": teacher()}, r"\['t'\] would teach nothing"),
    "none passed": (3.0, None, r"teacher_weight=3.0, but this .* no teachers.*weight = 0.0"),
    "nothing passed": ({"t": 3.0}, {}, r"teacher_weight={'t': 3.0}, but this"),
    "another": ({"t": 3.0}, {"u": teacher()}, r"\['u'\] but .* weights for \['t'\]"),
    "one missing": ({"t": 3.0, "u": 1.0}, {"t": teacher()}, r"\['t'\] but .*\['t', 'u'\]"),
    "one more": ({"t": 3.0}, {"t": teacher(), "u": teacher()}, r"\['t', 'u'\] but .*\['t'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_teachers(case):
    weight, teachers, words = BAD[case]
    loss_func = make(weight)
    ψ, φ = batch()
    with pytest.raises(BatchError, match=words):
        loss_func(ψ, Y, features=φ, teachers=teachers)
    assert loss_func.step == 0


def test_what_the_messages_suggest_works():
    ψ, φ = batch()
    t = {"t": teacher()}
    for weight, teachers in [(10.0, t), ({"t": 0.0}, t), (0.0, None), ({"t": 3.0}, t)]:
        make(weight)(ψ, Y, features=φ, teachers=teachers).backward()
    loss_func = make({"t": 0.0})
    value = loss_func(ψ, Y, features=φ, teachers=t)
    torch.testing.assert_close(value, plain_s2sd(loss_func, ψ, φ, Y, 0), **EXACT)
    assert loss_func.components["teacher_t"] > 0
    loss_func.teacher_weight = 0.0
    loss_func(ψ, Y, features=φ)


def test_other_names_than_in_the_steps_before_are_refused():
    loss_func = make()
    ψ, φ = batch()
    loss_func(ψ, Y, features=φ, teachers={"t": teacher()})
    with pytest.raises(BatchError, match=r"\['u'\], but they were \['t'\].*{'u': 1.0}"):
        loss_func(ψ, Y, features=φ, teachers={"u": teacher()})
    loss_func.teacher_weight = {"u": 1.0}  # as suggested
    loss_func(ψ, Y, features=φ, teachers={"u": teacher()})
    assert "teacher_t" not in loss_func.components


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (-1.0, "teacher_weight=-1.0"),
        (float("nan"), "teacher_weight=nan"),
        ("3", "teacher_weight='3'"),
        (None, "teacher_weight=None"),
        ({"t": -1.0}, r"teacher_weight\['t'\]=-1.0"),
        ({"t": None}, r"teacher_weight\['t'\]=None"),
        ({3: 1.0}, r"teacher_weight={3: 1.0}.*names"),
    ],
)
def test_bad_weights(weight, words):
    with pytest.raises(ArgumentError, match=words):
        make(weight)
    loss_func = make()
    loss_func.teacher_weight = weight
    ψ, φ = batch()
    with pytest.raises(ArgumentError, match=words):
        loss_func(ψ, Y, features=φ, teachers={"t": teacher()})


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (lambda step: -1.0, "teacher_weight=-1.0 at step 0"),
        ({"t": lambda step: -1.0}, r"teacher_weight\['t'\]=-1.0 at step 0"),
    ],
)
def test_a_schedule_gone_wrong(weight, words):
    ψ, φ = batch()
    with pytest.raises(ArgumentError, match=words):
        make(weight)(ψ, Y, features=φ, teachers={"t": teacher()})


# --- everything else works with them --------------------------------------------------------------


def test_copies_pickles_and_the_printout():
    loss_func = make({"t": 3.0})
    ψ, φ = batch()
    teachers = {"t": teacher()}
    value = loss_func(ψ, Y, features=φ, teachers=teachers)
    file = io.BytesIO()
    torch.save(loss_func, file)
    file.seek(0)
    for twin in (copy.deepcopy(loss_func), torch.load(file, weights_only=False)):
        assert torch.equal(twin(ψ, Y, features=φ, teachers=teachers), value)
        assert "teacher_weight={'t': 3.0}" in repr(twin)
    assert make(0.0).state_dict().keys() == loss_func.state_dict().keys()


def test_a_step_reads_nothing_back():
    loss_func = make({"t": 3.0, "u": 2.0}, matryoshka_dims=(2, 3))
    teachers = {"t": teacher(), "u": teacher(3)}

    def step():
        ψ, φ = batch()
        loss_func(ψ, Y, features=φ, teachers=teachers).backward()

    for _ in range(3):
        assert reads(step) == []


@pytest.mark.skipif(torch.__version__ < "2.4", reason="fullgraph works from there on")
@pytest.mark.parametrize(
    ("weight", "chunk_size"),
    [(3.0, None), ({"t": 3.0, "u": 0.5}, 5)],
)
@pytest.mark.slow
def test_compiled_in_one_graph_it_is_the_same(weight, chunk_size):
    torch._dynamo.reset()
    kwargs = {"feature_distill_delay": 1, "matryoshka_dims": (2, 3), "chunk_size": chunk_size}
    first = make(weight, **kwargs)
    second = copy.deepcopy(first)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(first, fullgraph=True, backend=counter)
    for step in range(3):
        ψ, φ = batch()
        teachers = {"t": teacher(), "u": teacher(3)}
        found = []
        for call, loss_func in ((compiled, first), (second, second)):
            value = call(ψ, Y, features=φ, teachers=teachers)
            components = dict(sorted(loss_func.components.items()))
            found.append([value.detach(), components, gradients(value, loss_func, ψ, φ)])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
        assert (found[0][1]["feature_distill"] > 0) == (step > 0)
    assert counter.frame_count == 1
