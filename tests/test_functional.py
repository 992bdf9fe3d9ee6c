"""relation_kl against its plain twin: values, gradients, chunks, precision."""

import hypothesis.strategies as st
import pytest
import torch
from helpers import plain_kl
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from s2sd_pml.errors import ArgumentError, BatchError, S2SDError
from s2sd_pml.functional import relation_kl, relation_kl_reference
from s2sd_pml.kernel import CACHED, GRAM_BLOCK, _blocks, products


def value_and_grad(function, student, teachers, **kwargs):
    student = student.detach().clone().requires_grad_()
    total, per_teacher = function(student, teachers, **kwargs)
    total.backward()
    return total.detach(), per_teacher, student.grad


@pytest.mark.filterwarnings("error::UserWarning")  # of a result that did not fit its buffer
@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 17),
    widths=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    chunk_size=st.one_of(st.none(), st.integers(1, 20)),
    temperature=st.floats(0.05, 10),
    exclude_self=st.booleans(),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    part=st.floats(0, 1),
)
def test_equals_the_plain_twin(
    batch, widths, chunk_size, temperature, exclude_self, seed, dtype, part
):
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype)

    student, teachers = draw(5), [draw(w) for w in widths]
    weights = torch.rand(len(widths), generator=generator).mul(60).tolist()
    start = int(part * (batch - 1))
    kwargs = {
        "weights": weights,
        "temperature": temperature,
        "exclude_self": exclude_self,
        "rows": (start, batch),
    }
    if not teachers:
        total, per_teacher = relation_kl(student, teachers, chunk_size=chunk_size, **kwargs)
        assert total == 0
        assert per_teacher.shape == (0,)
        return
    got = value_and_grad(relation_kl, student, teachers, chunk_size=chunk_size, **kwargs)
    expected = value_and_grad(relation_kl_reference, student, teachers, **kwargs)
    rtol, atol = {
        torch.float64: (1e-10, 1e-12),
        torch.float32: (1e-3, 1e-4),
        torch.bfloat16: (2e-2, 2e-2),
    }[dtype]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_is_the_equation_written_out_row_by_row(temperature, exclude_self):
    student, teacher = torch.randn(9, 4).double(), torch.randn(9, 7).double()
    expected = plain_kl(teacher, student, temperature, exclude_self)
    for function in (relation_kl, relation_kl_reference):
        total, per_teacher = function(
            student, [teacher], weights=[3.0], temperature=temperature, exclude_self=exclude_self
        )
        torch.testing.assert_close(per_teacher[0], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(total, 3 * expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradcheck(chunk_size, exclude_self):
    student = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    teachers = [torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)]

    def total(x):
        return relation_kl(
            x,
            teachers,
            weights=[2.0, 0.5],
            temperature=0.7,
            exclude_self=exclude_self,
            chunk_size=chunk_size,
        )[0]

    assert torch.autograd.gradcheck(total, student)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 300, 2000])
def test_batches_of_several_blocks(chunk_size, exclude_self):
    batch = 2 * GRAM_BLOCK + 77
    student, teachers = torch.randn(batch, 6).double(), [torch.randn(batch, 9).double()]
    kwargs = {"weights": [3.0], "temperature": 0.5, "exclude_self": exclude_self}
    got = value_and_grad(relation_kl, student, teachers, chunk_size=chunk_size, **kwargs)
    expected = value_and_grad(relation_kl_reference, student, teachers, **kwargs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_known_cosines_of_teachers_are_used(chunk_size):
    student, teachers = torch.randn(9, 4).double(), [torch.randn(9, 5).double() for _ in range(2)]
    unit = torch.nn.functional.normalize(teachers[1], dim=1)
    known = unit @ unit.T
    before = known.clone()
    kwargs = {"weights": [3.0, 2.0], "temperature": 0.5, "exclude_self": True, "rows": (2, 9)}
    expected = value_and_grad(relation_kl, student, teachers, **kwargs)
    kwargs |= {"chunk_size": chunk_size, "cosines": [None, known]}
    got = value_and_grad(relation_kl, student, [teachers[0], torch.empty(9, 1).double()], **kwargs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.equal(known, before)
    for wrong in ([None], [None] * 3, [None, 3]):
        with pytest.raises(BatchError, match="cosines have the shapes .* for 2 teachers"):
            relation_kl(student, teachers, weights=[1.0, 1.0], cosines=wrong)
    with pytest.raises(BatchError, match=r"cosines have the shapes \[None, \(9, 8\)\]"):
        relation_kl(student, teachers, weights=[1.0, 1.0], cosines=[None, known[:, 1:]])


def test_teachers_get_no_gradient():
    student = torch.randn(6, 3, requires_grad=True)
    teacher = torch.randn(6, 4, requires_grad=True)
    relation_kl(student, [teacher], weights=[1.0])[0].backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_a_teacher_equal_to_the_student_costs_nothing_and_moves_nothing():
    x = torch.randn(8, 5, dtype=torch.float64)
    total, _, grad = value_and_grad(relation_kl, x, [x * 3], weights=[50.0])
    assert total.abs() < 1e-12
    assert grad.abs().max() < 1e-12


def test_a_second_derivative_is_refused():
    student = torch.randn(6, 3, requires_grad=True)
    total, _ = relation_kl(student, [torch.randn(6, 4)], weights=[1.0])
    (grad,) = torch.autograd.grad(total, student, create_graph=True)
    with pytest.raises(S2SDError, match="relation_kl_reference"):
        grad.pow(2).sum().backward()


def test_autocast_does_not_lower_the_precision():
    student, teacher = torch.randn(16, 8), torch.randn(16, 8)
    plain = relation_kl(student, [teacher], weights=[1.0])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = relation_kl(student, [teacher], weights=[1.0])[0]
    assert torch.equal(plain, cast)


def test_zero_vectors_give_finite_gradients():
    student = torch.zeros(5, 3, requires_grad=True)
    total, _ = relation_kl(student, [torch.randn(5, 4)], weights=[1.0], temperature=0.05)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()


def test_one_row_at_a_time_weight_zero_and_the_defaults_of_the_twin():
    student, teacher = torch.randn(7, 3, requires_grad=True), torch.randn(7, 5)
    total, each = relation_kl(student, [teacher], weights=[2.0], chunk_size=1)
    expected, expected_each = relation_kl_reference(student, [teacher], weights=[2.0])
    torch.testing.assert_close((total, each), (expected, expected_each))
    nothing, each = relation_kl(student, [teacher], weights=[0.0])
    assert nothing == 0
    torch.testing.assert_close(each, expected_each)


def test_a_symmetric_product_costs_little_more_than_half():
    x = torch.randn(4 * GRAM_BLOCK, 8)
    out = torch.empty(len(x), len(x))
    with FlopCounterMode(display=False) as counter:
        products(x, 0, len(x), out)
    torch.testing.assert_close(out, x @ x.T)
    assert counter.get_total_flops() == 0.625 * 2 * len(x) ** 2 * 8


@pytest.mark.parametrize("function", [relation_kl, relation_kl_reference])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_one_sample_and_no_teachers_cost_nothing(function, exclude_self):
    kwargs = {"weights": [2.0], "exclude_self": exclude_self}
    total, _, grad = value_and_grad(function, torch.randn(1, 3), [torch.randn(1, 5)], **kwargs)
    assert total == 0
    assert (grad == 0).all()
    total, each = function(torch.randn(4, 3), [], weights=[])
    assert total == 0
    assert each.shape == (0,)


def test_blocks_fill_the_cache_and_no_more():
    x = torch.empty(300, 2000)
    *full, last = _blocks(x)
    assert [row for block in [*full, last] for row in range(300)[block]] == list(range(300))
    assert {CACHED // x[block].numel() for block in full} == {1}
    assert x[last].numel() <= CACHED


X = torch.randn(4, 3)


@pytest.mark.parametrize("function", [relation_kl, relation_kl_reference])
@pytest.mark.parametrize(
    ("student", "teachers", "kwargs", "error", "words"),
    [
        (X, [torch.randn(5, 3)], {}, BatchError, "5 rows"),
        (X[0], [X], {}, BatchError, r"\(3,\)"),
        (X.long(), [X], {}, BatchError, "int64"),
        (X, [X[None]], {}, BatchError, r"teachers\[0\]"),
        (X[:0], [X[:0]], {}, BatchError, "drop_last"),
        (X, [X, X], {}, ArgumentError, "weights=\\[1.0\\] for 2 teachers"),
        (X, [X], {"weights": [float("nan")]}, ArgumentError, "nan"),
        (X, [X], {"weights": [-1.0]}, ArgumentError, "-1.0"),
        (X, [X], {"temperature": 0.0}, ArgumentError, "temperature=0.0"),
        (X, [X], {"temperature": float("inf")}, ArgumentError, "temperature=inf"),
        (X, [X], {"rows": (-1, 3)}, ArgumentError, r"\(-1, 3\)"),
        (X, [X], {"rows": (3, 2)}, ArgumentError, r"\(3, 2\)"),
        (X, [X], {"chunk_size": 0}, ArgumentError, "chunk_size=0"),
        (X, [X], {"rows": (2, 2)}, ArgumentError, r"\(2, 2\).*not empty"),
        (X, [X], {"rows": (0, 1, 2)}, ArgumentError, r"\(0, 1, 2\)"),
        (X, [X], {"rows": (0.0, 2.0)}, ArgumentError, r"\(0.0, 2.0\)"),
        (X, [X], {"weights": torch.ones(1)}, ArgumentError, r"tensor\(\[1.\]\).*a list"),
        (X, [X], {"rows": (2, 5)}, ArgumentError, r"\(2, 5\)"),
    ],
)
def test_bad_input_is_named(function, student, teachers, kwargs, error, words):
    with pytest.raises(error, match=words):
        function(student, teachers, **{"weights": [1.0], **kwargs})


@pytest.mark.skipif(torch.__version__ < "2.2", reason="an internal error of torch.compile")
def test_compiled_it_has_the_same_gradient():
    torch._dynamo.reset()
    student, teacher = torch.randn(12, 4, requires_grad=True), torch.randn(12, 7)

    def distil(student):
        return relation_kl(2 * student, [teacher], weights=[3.0])[0]

    want = torch.autograd.grad(distil(student), student)
    found = torch.autograd.grad(torch.compile(distil, backend="eager")(student), student)
    torch.testing.assert_close(found, want)
    torch._dynamo.reset()
    assert torch._dynamo.explain(distil)(student).break_reasons  # only some releases need it
