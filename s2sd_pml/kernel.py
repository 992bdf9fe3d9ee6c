"""The autograd Function behind ``functional.relation_kl``: all its values and its gradient, once.

Written for speed. What it computes is told in ``functional.relation_kl``; its plain twin is
``functional.relation_kl_reference``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import S2SDError
from .uncompiled import uncompiled

GRAM_BLOCK = 256  # rows of a symmetric product at a time
CACHED = 2**17  # entries that the elementwise steps work on at a time: they stay in the cache


@uncompiled
def distil(*args: Any) -> tuple[Tensor, Tensor]:
    """The total and the divergences of ``RelationKL``."""
    return RelationKL.apply(*args)  # type: ignore[no-any-return,no-untyped-call]


class RelationKL(torch.autograd.Function):
    """The student has unit rows, the teachers any. The gradient is ready when forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weights: tuple[float, ...],
        temperature: float,
        exclude_self: bool,
        chunk_size: int,
        rows: tuple[int, int],
        cosines: Sequence[Tensor | None],
        *teachers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        start, stop = rows
        grad = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        per_teacher = student.new_zeros(len(teachers))
        scales = {  # one over the norms, as F.normalize has them
            j: 1 / t.norm(dim=1).clamp_min_(1e-12)
            for j, t in enumerate(teachers)
            if cosines[j] is None
        }
        # A chunk of rows each: the student's log-probabilities, a teacher's, and Σ_j w_j p_j.
        shape = (min(chunk_size, stop - start), len(student))
        buffers = [student.new_empty(shape) for _ in range(3)]
        for a in range(start, stop, chunk_size):
            b = min(a + chunk_size, stop)
            log_student, log_teacher, target = (buffer[: b - a] for buffer in buffers)

            def log_softmax_(x: Tensor, first: int) -> Tensor:
                """Of similarities that begin at row ``first``, in place."""
                if temperature != 1:
                    x.div_(temperature)
                if exclude_self:  # probability 0 and log-ratio 0, without inf - inf
                    x.diagonal(first).fill_(torch.finfo(x.dtype).min)
                return torch.log_softmax(x, dim=1, out=x)

            products(student, a, b, log_student)
            for r in _blocks(log_student):
                log_softmax_(log_student[r], a + r.start)
            for j, (teacher, weight) in enumerate(zip(teachers, weights, strict=True)):
                known = cosines[j]
                if known is None:
                    products(teacher, a, b, log_teacher)
                for r in _blocks(log_teacher):
                    if known is None:
                        log_teacher[r].mul_(scales[j][a:b][r, None]).mul_(scales[j])
                    else:
                        log_teacher[r].copy_(known[a:b][r])
                    log_p = log_softmax_(log_teacher[r], a + r.start)
                    p = log_p.exp()
                    if j == 0:
                        torch.mul(p, weight, out=target[r])
                    else:
                        target[r].add_(p, alpha=weight)
                    log_ratio = log_p.sub_(log_student[r])
                    per_teacher[j] += torch.dot(p.view(-1), log_ratio.view(-1))
            if grad is not None and teachers:
                # d total / d similarities, up to the factor T / number of rows
                for r in _blocks(log_student):
                    log_student[r].exp_().mul_(sum(weights)).sub_(target[r])
                delta = log_student
                grad[a:b].addmm_(delta, student)
                grad.addmm_(delta.T, student[a:b])
        count = stop - start
        per_teacher.mul_(temperature**2 / count)
        if grad is not None:
            ctx.save_for_backward(grad.mul_(temperature / count))
        ctx.mark_non_differentiable(per_teacher)
        ctx.set_materialize_grads(False)
        total = student.new_zeros(())
        for kl, weight in zip(per_teacher, weights, strict=True):
            total.add_(kl, alpha=weight)  # a tensor of the weights would wait for the device
        return total, per_teacher

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, _: None = None) -> tuple[Any, ...]:
        nones = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad_total is None:
            return None, *nones
        (grad,) = ctx.saved_tensors
        grad = grad_total * grad
        if torch.is_grad_enabled():  # create_graph=True: a second derivative may follow
            grad = _FirstOrderOnly.apply(grad.requires_grad_())  # type: ignore[no-untyped-call]
        return grad, *nones


def products(x: Tensor, a: int, b: int, out: Tensor) -> None:
    """Rows a to b of x @ x.T. All rows at once cost little more than half: it is symmetric."""
    n = len(x)
    if b - a < n or n <= GRAM_BLOCK or x.device.type != "cpu":  # launches cost more elsewhere
        torch.mm(x[a:b], x.T, out=out)
        return
    for r in range(0, n, GRAM_BLOCK):
        s = min(r + GRAM_BLOCK, n)
        torch.mm(x[r:s], x[r:].T, out=out[r:s, r:])
        out[s:, r:s] = out[r:s, s:].T


def _blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit into the cache; on other devices than the CPU one block."""
    height = max(CACHED // x.shape[1], 1) if x.device.type == "cpu" else max(len(x), 1)
    for first in range(0, len(x), height):
        yield slice(first, min(first + height, len(x)))


class _FirstOrderOnly(torch.autograd.Function):
    """Let a gradient through and refuse to differentiate it again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise S2SDError(
            "relation_kl was differentiated twice; its second derivative is not implemented. Use "
            "relation_kl_reference, or leave the distillation terms out of the gradient penalty."
        )
