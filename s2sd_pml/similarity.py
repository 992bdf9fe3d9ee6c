"""The block of similarity matrices: cos(x) of every space, (spaces, B, B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .counter import is_compiling

BLOCK = 256  # rows of a symmetric product at a time


class Similarities(NamedTuple):
    """The block of similarity matrices, and what the KL takes of it."""

    students: Tensor  # cos(ψ), (B, B); with prefixes of ψ (students, B, B)
    spaces: Tensor  # cos of students and heads, (students + m, B, B), for the metric losses
    teachers: Tensor  # cos of every teacher, (teachers, B, B), detached


def similarities(
    spaces: Sequence[Tensor], others: Sequence[Tensor], students: int = 1
) -> Similarities:
    """The block of students and heads; heads and others are the teachers.

    Args:
        spaces: ψ, its prefixes, then the heads, (B, d_i).
        others: further teachers (B, d_j).
        students: how many of the spaces come before the heads.
    """
    matrices = [cosines(x) for x in spaces]
    with torch.no_grad():
        teachers = torch.stack([*matrices[students:], *(cosines(x) for x in others)])
    block = torch.stack(matrices)
    return Similarities(matrices[0] if students == 1 else block[:students], block, teachers)


def cosines(x: Tensor) -> Tensor:
    """The cosine similarities of the rows of x (B, d), (B, B)."""
    return _Gram.apply(unit_rows(x))  # type: ignore[no-any-return,no-untyped-call]


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; half precision becomes float32."""
    return F.normalize(full_precision(x), dim=1)


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay, as the same tensor object."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Gram(torch.autograd.Function):
    """x @ x.T, whose two products in the backward pass are one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.device.type != "cpu" or len(x) <= BLOCK or is_compiling():
            return x @ x.T
        out = x.new_empty(len(x), len(x))
        for a in range(0, len(x), BLOCK):  # half of a symmetric matrix, and its mirror image
            b = a + BLOCK
            out[a:b, a:] = x[a:b] @ x[a:].T
            out[b:, a:b] = out[a:b, b:].T
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        both: Tensor = (grad + grad.T) @ x
        return both
