"""The block of similarity matrices: cos(x) of every space, (spaces, B, B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_block(spaces: Sequence[Tensor]) -> Tensor:
    """The cosine similarities within the batch, in every space: (len(spaces), B, B).

    Args:
        spaces: embeddings (B, d_i) of the same batch, of any widths, in one dtype.
    """
    return torch.stack([_Gram.apply(unit_rows(x)) for x in spaces])  # type: ignore[no-untyped-call]


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
        return x @ x.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        both: Tensor = (grad + grad.T) @ x
        return both
