"""The block of cosine similarities: values, derivatives, precision."""

import pytest
import torch
import torch.nn.functional as F
from helpers import cosine_block
from torch.utils.flop_counter import FlopCounterMode

from s2sd_pml.similarity import (
    BLOCK,
    _Gram,
    cosines,
    full_precision,
    similarities,
    unit_rows,
)


def spaces(*widths, dtype=torch.float64):
    return [torch.randn(7, width).to(dtype).requires_grad_() for width in widths]


def plain(x):
    unit = F.normalize(x, dim=1)
    return unit @ unit.T


def test_every_matrix_is_that_of_its_space():
    block = cosine_block(spaces(3, 9, 1))
    assert block.shape == (3, 7, 7)
    given = spaces(3, 9, 1)
    for matrix, x in zip(cosine_block(given), given, strict=True):
        torch.testing.assert_close(matrix, plain(x))
        torch.testing.assert_close(matrix.diagonal(), torch.ones(7).double())
        torch.testing.assert_close(matrix, F.cosine_similarity(x[:, None], x[None], dim=2))


def test_gradients_are_those_of_the_plain_product():
    given = spaces(3, 9)
    weights = torch.randn(2, 7, 7).double()  # not symmetric
    found = torch.autograd.grad((cosine_block(given) * weights).sum(), given)
    want = torch.autograd.grad((torch.stack([plain(x) for x in given]) * weights).sum(), given)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_first_and_second_derivatives():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Gram.apply, x)
    assert torch.autograd.gradgradcheck(_Gram.apply, x)
    assert torch.autograd.gradgradcheck(lambda x: cosine_block([x, x[:, :2]]), x)


def test_one_product_forward_and_one_backward():
    x = torch.randn(8, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        cosine_block([x]).pow(2).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 8 * 8 * 4)


def test_a_space_of_constants_has_no_gradient():
    x, teacher = spaces(3, 4)
    block = cosine_block([x, teacher.detach()])
    block[1].sum().backward()
    assert teacher.grad is None
    assert not x.grad.any()
    assert not cosine_block([teacher.detach()]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype):
    x = torch.randn(7, 3).to(dtype).requires_grad_()
    assert full_precision(x).dtype == torch.float32
    assert unit_rows(x).dtype == cosine_block([x]).dtype == torch.float32
    torch.testing.assert_close(cosine_block([x])[0], plain(x.float()))
    cosine_block([x]).pow(2).sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_stays_as_the_same_object(dtype):
    """PML compares references with embeddings by identity."""
    x = torch.randn(7, 3, dtype=dtype)
    assert full_precision(x) is x
    assert unit_rows(x).dtype == dtype
    torch.testing.assert_close(unit_rows(x).norm(dim=1), torch.ones(7, dtype=dtype))


def test_zero_rows_are_similar_to_nothing():
    x = torch.randn(4, 3).double()
    x[1] = 0
    block = cosine_block([x.requires_grad_()])
    assert not block[0, 1].any()
    assert not block[0, :, 1].any()
    block.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("batch", [BLOCK, BLOCK + 1, 2 * BLOCK + 77])
def test_half_of_a_large_symmetric_product_is_computed(batch):
    x = torch.randn(batch, 3, dtype=torch.float64)
    torch.testing.assert_close(cosines(x), plain(x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("others", [0, 2])
def test_teachers_are_the_other_spaces_in_order_detached(others):
    given = spaces(3, 9, 4)
    more = [torch.randn(len(given[0]), 2, dtype=given[0].dtype) for _ in range(others)]
    found = similarities(given, more)
    assert found.students is not found.spaces
    torch.testing.assert_close(found.students, plain(given[0]))
    torch.testing.assert_close(found.spaces, torch.stack([plain(x) for x in given]))
    torch.testing.assert_close(found.teachers, torch.stack([plain(x) for x in given[1:] + more]))
    assert not found.teachers.requires_grad


def test_students_come_before_the_heads_who_teach():
    given = spaces(5, 2, 9, 4)
    found = similarities(given, [], students=2)
    torch.testing.assert_close(found.students, torch.stack([plain(x) for x in given[:2]]))
    torch.testing.assert_close(found.teachers, torch.stack([plain(x) for x in given[2:]]))
    assert len(found.spaces) == 4
