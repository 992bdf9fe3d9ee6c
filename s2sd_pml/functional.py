"""Relational distillation: the KL divergence between rows of batch similarity matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, BatchError, S2SDError

GRAM_BLOCK = 512  # rows at a time; smaller batches are one product


def relation_kl(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    weights: Sequence[float],
    temperature: float = 1.0,
    exclude_self: bool = False,
    chunk_size: int | None = None,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the KL divergences from each teacher's batch relations to the student's.

        KL_j = T² / B Σ_i KL( softmax(cos(t_j)_i / T) ‖ softmax(cos(s)_i / T) )
        total = Σ_j w_j KL_j

    cos(x) is the B x B matrix of cosine similarities of the rows of x. Teachers are detached. The
    gradient with respect to the student's similarities,
    T / B (Σ_j w_j p_s - Σ_j w_j p_j), folds all teachers into one matrix; it
    is accumulated into the gradient of the embeddings chunk by chunk in forward, so memory is
    O(chunk_size * B) however many teachers there are.

    Args:
        student: embeddings (B, D), not necessarily normalised.
        teachers: embeddings (B, d_j) of any widths.
        weights: one finite w_j >= 0 for each teacher.
        temperature: T > 0.
        exclude_self: leave the diagonal (similarity 1 to itself) out of both softmaxes.
        chunk_size: rows of the similarity matrices held at once; None holds all.
        rows: (start, stop) of the rows that the sum and the mean 1/B run over; None is all. Every
            row still meets all columns.

    Returns:
        total, a scalar with gradient with respect to ``student``, and the detached unweighted
        ``KL_j`` of shape (number of teachers,). Half precision is computed in float32.

    Raises:
        S2SDError: for wrong shapes or ranges, and on a second derivative, which is not implemented.

    Source:
        Roth et al., ICML 2021, equation 1 (arXiv 2009.08348).

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(4, 2, requires_grad=True), torch.eye(4, 8)
        >>> total, per_teacher = relation_kl(student, [teacher], weights=[50.0])
        >>> bool(total > 0), per_teacher.shape
        (True, torch.Size([1]))
    """
    _validate(student, teachers, weights, temperature, chunk_size, rows)
    start, stop = rows or (0, len(student))
    with torch.autocast(student.device.type, enabled=False):
        total, per_teacher = _RelationKL.apply(  # type: ignore[no-untyped-call]
            _unit_rows(student),
            tuple(float(w) for w in weights),
            temperature,
            exclude_self,
            chunk_size or max(stop - start, 1),
            (start, stop),
            *(_unit_rows(t.detach()) for t in teachers),
        )
    return total, per_teacher


def relation_kl_reference(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    weights: Sequence[float],
    temperature: float = 1.0,
    exclude_self: bool = False,
    chunk_size: int | None = None,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain twin of ``relation_kl``: the equation as written, for tests and readers."""
    _validate(student, teachers, weights, temperature, chunk_size, rows)
    start, stop = rows or (0, len(student))

    def log_relations(x: Tensor) -> Tensor:
        similarities = _unit_rows(x) @ _unit_rows(x).T / temperature
        if exclude_self:
            similarities.fill_diagonal_(-math.inf)
        return similarities.log_softmax(dim=1)[start:stop]

    with torch.autocast(student.device.type, enabled=False):
        log_student, divergences = log_relations(student), []
        for teacher in teachers:
            log_teacher = log_relations(teacher.detach())
            terms = log_teacher.exp() * (log_teacher - log_student)
            if exclude_self:
                own = torch.arange(stop - start, device=terms.device)
                terms = terms.index_put((own, own + start), terms.new_zeros(()))
            divergences.append(temperature**2 * terms.sum(dim=1).mean())
        if len(student) == 1 or not divergences:  # one sample has no relations to others
            divergences = [_unit_rows(student).sum() * 0.0 for _ in teachers]
        per_teacher = torch.stack(divergences) if divergences else log_student.new_zeros(0)
        total = (per_teacher * per_teacher.new_tensor(list(weights))).sum()
    return total, per_teacher.detach()


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay, as the same tensor object."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unit_rows(x: Tensor) -> Tensor:
    return F.normalize(full_precision(x), dim=1)


class _RelationKL(torch.autograd.Function):
    """Student and teachers are unit rows. The gradient is ready when forward ends."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weights: tuple[float, ...],
        temperature: float,
        exclude_self: bool,
        chunk_size: int,
        rows: tuple[int, int],
        *teachers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        start, stop = rows
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.zeros_like(student) if needs_grad else None
        per_teacher = student.new_zeros(len(teachers))
        alone = exclude_self and len(student) == 1
        for a in () if alone else range(start, stop, chunk_size):
            b = min(a + chunk_size, stop)
            log_student = _log_relations(student, a, b, temperature, exclude_self)
            target = torch.zeros_like(log_student)
            for j, (teacher, weight) in enumerate(zip(teachers, weights, strict=True)):
                log_teacher = _log_relations(teacher, a, b, temperature, exclude_self)
                p_teacher = log_teacher.exp()
                target.add_(p_teacher, alpha=weight)
                log_ratio = log_teacher.sub_(log_student)
                per_teacher[j] += torch.dot(p_teacher.view(-1), log_ratio.view(-1))
            if grad is not None:
                # d total / d similarities, up to the factor T / number of rows
                delta = log_student.exp_().mul_(sum(weights)).sub_(target)
                grad[a:b].addmm_(delta, student)
                grad.addmm_(delta.T, student[a:b])
        count = max(stop - start, 1)
        per_teacher.mul_(temperature**2 / count)
        if grad is not None:
            ctx.save_for_backward(grad.mul_(temperature / count))
        ctx.mark_non_differentiable(per_teacher)
        ctx.set_materialize_grads(False)
        return torch.dot(per_teacher, per_teacher.new_tensor(weights)), per_teacher

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


def _log_relations(x: Tensor, a: int, b: int, temperature: float, exclude_self: bool) -> Tensor:
    """Rows a to b of log softmax(cos(x) / T), for unit rows x."""
    similarities = _gram(x) if b - a == len(x) else x[a:b] @ x.T
    if temperature != 1:
        similarities.div_(temperature)
    if exclude_self:
        similarities.diagonal(a).fill_(-math.inf)
    log_p = similarities.log_softmax(dim=1)
    if exclude_self:  # probability 0 and log-ratio 0, without inf - inf
        log_p.diagonal(a).fill_(torch.finfo(log_p.dtype).min)
    return log_p


def _gram(x: Tensor) -> Tensor:
    """x @ x.T at little more than half its cost: it is symmetric."""
    n = len(x)
    if n <= GRAM_BLOCK:
        return x @ x.T
    gram = x.new_empty(n, n)
    for a in range(0, n, GRAM_BLOCK):
        b = min(a + GRAM_BLOCK, n)
        gram[a:b, a:] = x[a:b] @ x[a:].T
        gram[b:, a:b] = gram[a:b, b:].T
    return gram


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


def _validate(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    chunk_size: int | None,
    rows: tuple[int, int] | None,
) -> None:
    """The checks that both twins share."""
    for name, x in [("student", student), *((f"teachers[{j}]", t) for j, t in enumerate(teachers))]:
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise BatchError(f"{name} must be a floating point tensor (B, D) but is {seen}.")
        if len(x) != len(student):
            raise BatchError(
                f"{name} has {len(x)} rows but student has {len(student)}. "
                "Both must come from the same batch, in the same order."
            )
    if len(student) == 0:
        raise BatchError("student has no rows. Skip empty batches (drop_last=True).")
    if not isinstance(weights, Sequence) or len(weights) != len(teachers):
        raise ArgumentError(
            f"weights={weights!r} for {len(teachers)} teachers. Pass one for each teacher."
        )
    for weight in weights:
        if not isinstance(weight, Real) or not (math.isfinite(weight) and weight >= 0):
            raise ArgumentError(f"weights={list(weights)!r}: each must be finite and at least 0.")
    if not isinstance(temperature, Real) or not 0 < float(temperature) < math.inf:
        raise ArgumentError(f"temperature={temperature!r} must be finite and above 0.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"chunk_size={chunk_size!r} must be a whole number above 0, or None.")
    if rows is not None and not 0 <= rows[0] <= rows[1] <= len(student):
        raise ArgumentError(f"rows={rows!r} must lie within 0 and the batch of {len(student)}.")
