"""relation_kl against its plain twin: values, gradients, chunks, precision, memory."""

import itertools
import sys
import weakref
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from helpers import plain_kl
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from s2sd_pml import functional
from s2sd_pml.errors import ArgumentError, BatchError
from s2sd_pml.functional import relation_kl, relation_kl_reference, rows_kl

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from harness import peak_memory

BOTH = pytest.mark.parametrize("function", [relation_kl, relation_kl_reference])
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def value_and_grad(function, student, teachers, **kwargs):
    """One number a teacher, and the gradient of a sum of them with a weight each."""
    student = student.detach().clone().requires_grad_()
    kl = function(student, teachers, **kwargs)
    (kl * torch.linspace(1, 60, len(kl), dtype=kl.dtype)).sum().backward()
    return kl.detach(), student.grad


def batch(rows, *widths, dtype=torch.float64):
    student, *teachers = (torch.randn(rows, width).to(dtype) for width in (5, *widths))
    return student, teachers


@pytest.mark.filterwarnings("error::UserWarning")
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 17),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk_size=st.one_of(st.none(), st.integers(1, 20)),
    temperature=st.one_of(st.just(1.0), st.floats(0.05, 10)),
    exclude_self=st.booleans(),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
)
def test_equals_the_plain_twin(rows, widths, chunk_size, temperature, exclude_self, seed, dtype):
    torch.manual_seed(seed)
    student, teachers = batch(rows, *widths, dtype=dtype)
    kwargs = {"temperature": temperature, "exclude_self": exclude_self}
    found = value_and_grad(relation_kl, student, teachers, chunk_size=chunk_size, **kwargs)
    expected = value_and_grad(relation_kl_reference, student, teachers, **kwargs)
    rtol, atol = {
        torch.float64: (1e-10, 1e-12),
        torch.float32: (1e-3, 1e-4),
        torch.bfloat16: (2e-2, 2e-2),
    }[dtype]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert found[0].shape == (len(widths),)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[1].dtype == dtype


@BOTH
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_is_the_equation_written_out_row_by_row(temperature, exclude_self, function):
    student, teachers = batch(9, 7, 4)
    expected = [plain_kl(t, student, temperature, exclude_self) for t in teachers]
    found = function(student, teachers, temperature=temperature, exclude_self=exclude_self)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_first_and_second_derivatives(chunk_size, exclude_self):
    student, teachers = batch(7, 4, 2)
    kwargs = {"temperature": 0.7, "exclude_self": exclude_self, "chunk_size": chunk_size}

    def kl(x):
        return relation_kl(x, teachers, **kwargs)

    assert torch.autograd.gradcheck(kl, student.requires_grad_())
    assert torch.autograd.gradgradcheck(kl, student)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 12, 13])
def test_chunks_change_nothing(chunk_size, exclude_self):
    student, teachers = batch(12, 3, 8)
    kwargs = {"temperature": 0.5, "exclude_self": exclude_self}
    whole = value_and_grad(relation_kl, student, teachers, **kwargs)
    chunked = value_and_grad(relation_kl, student, teachers, chunk_size=chunk_size, **kwargs)
    for a, b in zip(chunked, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 2, 5])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 8, 9)])
def test_parts_of_the_rows_make_up_the_whole(cuts, exclude_self, chunk_size):
    """As ranks compute it, each over its own rows."""
    student, teachers = batch(9, 4, 6)

    def by_parts(student, teachers):
        parts = itertools.pairwise(cuts)
        options = (0.5, exclude_self, chunk_size)
        means = [(b - a) * rows_kl([student], teachers, (a, b), *options) for a, b in parts]
        return sum(means) / len(student)

    found = value_and_grad(by_parts, student, teachers)
    kwargs = {"temperature": 0.5, "exclude_self": exclude_self}
    want = value_and_grad(relation_kl_reference, student, teachers, **kwargs)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_several_students_it_is_the_mean(dtype, exclude_self, chunk_size):
    student, teachers = batch(9, 4, 6, dtype=dtype)
    students = [student[:, :k] for k in (5, 1, 3)]
    options = (0.5, exclude_self, chunk_size)
    found = rows_kl(students, teachers, (2, 9), *options)
    want = torch.stack([rows_kl([s], teachers, (2, 9), *options) for s in students]).mean(dim=0)
    torch.testing.assert_close(found, want)
    assert torch.isfinite(found).all()


def test_a_part_of_the_rows_is_their_own_mean():
    student, teachers = batch(6, 4)
    rows = [rows_kl([student], teachers, (i, i + 1), 1.0, False, None) for i in range(6)]
    assert len({round(float(row), 9) for row in rows}) == 6
    found = rows_kl([student], teachers, (2, 5), 1.0, False, 2)
    torch.testing.assert_close(found, torch.stack(rows[2:5]).mean(dim=0), **EXACT)


def test_a_rank_with_few_rows_makes_no_matrix_of_the_whole_batch(monkeypatch):
    student, teachers = batch(9, 4)
    want = rows_kl([student], teachers, (2, 5), 1.0, False, None)
    monkeypatch.setattr(functional, "cosines", None)  # of all rows
    for chunk_size in (3, 8):
        found = rows_kl([student], teachers, (2, 5), 1.0, False, chunk_size)
        torch.testing.assert_close(found, want, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_teachers_get_no_gradient(chunk_size):
    student, teachers = torch.randn(6, 3, requires_grad=True), [torch.randn(6, 4)]
    teachers[0].requires_grad_()
    relation_kl(student, teachers, chunk_size=chunk_size).sum().backward()
    assert teachers[0].grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_a_teacher_equal_to_the_student_costs_nothing_and_moves_nothing(exclude_self, chunk_size):
    x = torch.randn(8, 5, dtype=torch.float64)
    kwargs = {"exclude_self": exclude_self, "chunk_size": chunk_size, "temperature": 0.1}
    kl, grad = value_and_grad(relation_kl, x, [x * 3], **kwargs)
    assert kl.abs() < 1e-12
    assert grad.abs().max() < 1e-12


@BOTH
@pytest.mark.parametrize("kwargs", [{}, {"chunk_size": 5}])
def test_autocast_does_not_lower_the_precision(kwargs, function):
    student, teachers = batch(16, 8, dtype=torch.float32)
    plain = function(student, teachers, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = function(student, teachers, **kwargs)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("zero", ["student", "teacher", "a row of both"])
def test_zero_vectors_give_finite_gradients(zero, chunk_size):
    student, teacher = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    if zero == "a row of both":
        student[2] = teacher[2] = 0
    else:
        (student if zero == "student" else teacher).zero_()
    kwargs = {"temperature": 0.05, "chunk_size": chunk_size}
    found = value_and_grad(relation_kl, student, [teacher], **kwargs)
    want = value_and_grad(relation_kl_reference, student, [teacher], temperature=0.05)
    for a, b in zip(found, want, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-2)  # it is divided by 1e-12


@BOTH
@pytest.mark.parametrize("exclude_self", [False, True])
def test_one_sample_and_no_teachers_cost_nothing(function, exclude_self):
    student, teachers = batch(1, 5)
    kl, grad = value_and_grad(function, student, teachers, exclude_self=exclude_self)
    assert kl == 0
    assert (grad == 0).all()
    for chunk_size in (None, 2):
        none = function(torch.randn(4, 3), [], exclude_self=exclude_self, chunk_size=chunk_size)
        assert none.shape == (0,)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_large_embeddings_and_small_temperatures_stay_finite(chunk_size):
    student, teachers = batch(6, 4, dtype=torch.float32)
    kwargs = {"temperature": 1e-3, "exclude_self": True, "chunk_size": chunk_size}
    found = value_and_grad(relation_kl, 1e15 * student, [1e15 * teachers[0]], **kwargs)
    assert all(torch.isfinite(x).all() for x in found)
    assert found[0] > 0


def test_no_graph_without_a_student_to_train():
    student, teachers = batch(6, 4)
    for chunk_size in (None, 2):
        assert not relation_kl(student, teachers, chunk_size=chunk_size).requires_grad
        with torch.no_grad():
            kl = relation_kl(student.requires_grad_(), teachers, chunk_size=chunk_size)
        assert not kl.requires_grad
        student = student.detach()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_inputs_stay_as_they_are(chunk_size):
    student, teachers = batch(7, 4, 4)
    before = [x.clone() for x in (student, *teachers)]
    value_and_grad(relation_kl, student, teachers, exclude_self=True, chunk_size=chunk_size)
    assert all(torch.equal(a, b) for a, b in zip((student, *teachers), before, strict=True))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_nothing_is_kept_after_backward(chunk_size):
    """A loss tensor that the user keeps keeps no matrix and no teacher alive."""
    student, teachers = batch(7, 4)
    kl = relation_kl(2 * student.requires_grad_(), teachers, chunk_size=chunk_size)
    kl.sum().backward()
    held = weakref.ref(teachers.pop())
    saved = [n for n in graph(kl.grad_fn) if "Gram" in type(n).__name__ and not is_freed(n)]
    assert held() is None
    assert not saved


def graph(node):
    """The nodes of the graph below, and that one."""
    found, todo = [], [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo.extend(below for below, _ in node.next_functions)
    return found


def is_freed(node):
    try:
        return not node.saved_tensors
    except RuntimeError:  # "after they have already been freed"
        return True


def test_chunks_bound_the_memory():
    """A chunk holds 32 of 1024 rows of each matrix; the plain equations hold all, several times."""
    student, teachers = batch(1024, 16, 16, 16, 16, 16, dtype=torch.float32)
    student.requires_grad_()

    def peak(function, **kwargs):
        return peak_memory(lambda: function(student, teachers, **kwargs).sum().backward())

    plain = peak(relation_kl_reference)
    assert peak(relation_kl, chunk_size=32) < 0.07 * plain
    assert peak(relation_kl) < 2 * plain


def test_the_backward_pass_of_a_matrix_is_one_product():
    student, teachers = torch.randn(64, 8, requires_grad=True), [torch.randn(64, 8)]
    with FlopCounterMode(display=False) as counter:
        relation_kl(student, teachers).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 64 * 8


X = torch.randn(4, 3)


@BOTH
@pytest.mark.parametrize(
    ("student", "teachers", "kwargs", "error", "words"),
    [
        (X, [torch.randn(5, 3)], {}, BatchError, r"teachers\[0\] has 5 rows but student has 4"),
        (X, [X, torch.randn(3, 3)], {}, BatchError, r"teachers\[1\] has 3 rows"),
        (X[0], [X], {}, BatchError, r"student .*\(3,\)"),
        (X.long(), [X], {}, BatchError, "int64"),
        (X, [X[None]], {}, BatchError, r"teachers\[0\]"),
        (X, [X.tolist()], {}, BatchError, r"teachers\[0\] .* list"),
        (X[:0], [X[:0]], {}, BatchError, "drop_last"),
        (X, [X], {"temperature": 0.0}, ArgumentError, "temperature=0.0"),
        (X, [X], {"temperature": -1.0}, ArgumentError, "temperature=-1.0"),
        (X, [X], {"temperature": float("inf")}, ArgumentError, "temperature=inf"),
        (X, [X], {"temperature": float("nan")}, ArgumentError, "temperature=nan"),
        (X, [X], {"chunk_size": 0}, ArgumentError, "chunk_size=0.*None"),
        (X, [X], {"chunk_size": 2.5}, ArgumentError, "chunk_size=2.5"),
    ],
)
def test_bad_input_is_named(function, student, teachers, kwargs, error, words):
    with pytest.raises(error, match=words):
        function(student, teachers, **kwargs)


@pytest.mark.skipif(torch.__version__ < "2.2", reason="an internal error of torch.compile")
@pytest.mark.parametrize("exclude_self", [False, True])
def test_compiled_in_one_piece_it_is_the_same(exclude_self):
    torch._dynamo.reset()
    student, teachers = batch(12, 7, 3)
    kwargs = {"temperature": 0.5, "exclude_self": exclude_self}
    compiled = torch.compile(relation_kl, fullgraph=True, backend="aot_eager")
    found = value_and_grad(compiled, student, teachers, **kwargs)
    for a, b in zip(found, value_and_grad(relation_kl, student, teachers, **kwargs), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_rows_of_great_length_do_not_overflow(chunk_size):
    student, unit = torch.randn(7, 3), torch.nn.functional.normalize(torch.randn(7, 4), dim=1)
    found = relation_kl(student, [unit * 1e19], chunk_size=chunk_size)
    torch.testing.assert_close(found, relation_kl(student, [unit]))


def test_rows_whose_length_overflows_are_the_same_in_chunks():
    student, teacher = torch.randn(7, 3), torch.nn.functional.normalize(torch.randn(7, 4), dim=1)
    whole = relation_kl(student, [teacher * 3e19])
    torch.testing.assert_close(relation_kl(student, [teacher * 3e19], chunk_size=3), whole)
