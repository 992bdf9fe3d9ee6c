"""Relational distillation: the KL divergence between rows of batch similarity matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import BatchError
from .similarity import cosines, full_precision, unit_rows
from .validation import check_positive, check_whole

Options = tuple[int, float, bool]  # of log_relations: first row, temperature, exclude_self


def relation_kl(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    exclude_self: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """The KL divergence from each teacher's batch relations to the student's.

        KL_j = T² / B Σ_i KL( softmax(cos(t_j)_i / T) ‖ softmax(cos(s)_i / T) )

    cos(x) is the B x B matrix of cosine similarities of the rows of x. Teachers are detached.

    Args:
        student: embeddings (B, D), not necessarily normalised.
        teachers: embeddings (B, d_j) of any widths.
        temperature: T > 0.
        exclude_self: leave the diagonal (similarity 1 to itself) out of both softmaxes.
        chunk_size: rows of the similarity matrices held at once; None holds all. With it, memory is
            O(chunk_size * B * teachers) and the backward pass computes the matrices again.

    Returns:
        KL_j, (number of teachers,), differentiable in the student, in the student's precision;
        half precision in float32.

    Raises:
        S2SDError: for wrong shapes or ranges.

    Source:
        Roth et al., ICML 2021, equation 1 (arXiv 2009.08348).

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(4, 2, requires_grad=True), torch.eye(4, 8)
        >>> kl = relation_kl(student, [teacher])
        >>> (50.0 * kl.sum()).backward()
        >>> kl.shape, bool(kl > 0)
        (torch.Size([1]), True)
    """
    _check(student, teachers, temperature, chunk_size)
    return rows_kl([student], teachers, (0, len(student)), temperature, exclude_self, chunk_size)


def relation_kl_reference(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    exclude_self: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """The plain twin of ``relation_kl``: the equation as written, for tests and readers."""
    _check(student, teachers, temperature, chunk_size)

    def log_relations(x: Tensor) -> Tensor:
        similarities = unit_rows(x) @ unit_rows(x).T / temperature
        if exclude_self:
            similarities.fill_diagonal_(-math.inf)
        return similarities.log_softmax(dim=1)

    with torch.autocast(student.device.type, enabled=False):
        log_student, divergences = log_relations(student), []
        for teacher in teachers:
            log_teacher = log_relations(teacher.detach().to(log_student.dtype))
            terms = log_teacher.exp() * (log_teacher - log_student)
            if exclude_self:  # 0 (-inf - -inf) counts as 0
                terms = terms.masked_fill(torch.eye(len(terms), device=terms.device).bool(), 0)
            divergences.append(temperature**2 * terms.sum(dim=1).mean())
        return torch.stack(divergences) if divergences else student.new_zeros(0)


def rows_kl(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    rows: tuple[int, int],
    temperature: float,
    exclude_self: bool,
    chunk_size: int | None,
) -> Tensor:
    """``relation_kl`` over the rows from start to stop, each against the whole batch.

    Of several students it is the mean over them.
    """
    start, stop = rows
    with torch.autocast(students[0].device.type, enabled=False):
        students = [full_precision(s) for s in students]
        teachers = [t.detach().to(students[0].dtype) for t in teachers]
        if not teachers:
            return students[0].new_zeros(0)
        if chunk_size is None or chunk_size >= len(students[0]):
            options = (start, temperature, exclude_self)
            matrices = (cosines(t)[start:stop] for t in teachers)
            own_matrices = (cosines(s)[start:stop] for s in students)
            return summed_kl(own_matrices, matrices, options) / (stop - start)
        scales = [1 / t.norm(dim=1).clamp_min(1e-12) for t in teachers]

        def chunk_kl(first: int, *units: Tensor) -> Tensor:
            own = slice(first, min(first + chunk_size, stop))
            matrices = (
                ((t[own] * scale[own, None]) @ t.T).mul_(scale)  # no overflow in between
                for t, scale in zip(teachers, scales, strict=True)
            )
            own_matrices = (unit[own] @ unit.T for unit in units)
            return summed_kl(own_matrices, matrices, (first, temperature, exclude_self))

        units, total = [unit_rows(s) for s in students], students[0].new_zeros(len(teachers))
        for first in range(start, stop, chunk_size):
            part = checkpoint(
                chunk_kl, first, *units, use_reentrant=False, preserve_rng_state=False
            )
            total = total + part
        return total / (stop - start)


def summed_kl(students: Iterable[Tensor], teachers: Iterable[Tensor], options: Options) -> Tensor:
    """The sum over rows in place of the mean of ``similarity_kl``, with few matrices at a time."""
    first, *others = (log_relations(s, *options) for s in students)
    log_student = sum(others, start=first) / (1 + len(others)) if others else first
    each = [divergence(log_student, log_relations(t, *options)) for t in teachers]
    return options[1] ** 2 * torch.stack(each)


def similarity_kl(
    students: Tensor, teachers: Tensor, first: int, temperature: float, exclude_self: bool
) -> Tensor:
    """The mean over rows of T² KL(teacher_i / T ‖ student_i / T), for every teacher.

    Of several students it is the mean over them, the KL to the mean of their log-softmaxes q_k:
    mean_k Σ p (log p - log q_k) = Σ p (log p - mean_k log q_k).

    Args:
        students: R rows of its similarity matrix, (R, B), or of theirs, (students, R, B).
        teachers: the same rows of theirs, (teachers, R, B).
        first: which row of the whole matrix the first one is; row i has its own sample in column
            first + i.
    """
    log_student = log_relations(students, first, temperature, exclude_self)
    if log_student.ndim == 3:
        log_student = log_student.mean(dim=0)
    log_teachers = log_relations(teachers.detach(), first, temperature, exclude_self)
    return temperature**2 / len(log_student) * divergence(log_student, log_teachers)


def log_relations(
    similarities: Tensor, first: int, temperature: float, exclude_self: bool
) -> Tensor:
    """The log-softmax over each row of similarities / T, (..., R, B)."""
    if temperature != 1:
        similarities = similarities / temperature
    if exclude_self:  # probability 0 and log-ratio 0, without inf - inf
        n, size = similarities.shape[-2:]
        rows = torch.arange(first, first + n, device=similarities.device)
        own = torch.arange(size, device=similarities.device) == rows[:, None]
        lowest = torch.finfo(similarities.dtype).min / 2**20  # sums over students stay finite
        similarities = similarities.masked_fill(own, lowest)
    return similarities.log_softmax(dim=-1)


def divergence(log_student: Tensor, log_teachers: Tensor) -> Tensor:
    """The sum over rows of KL(teacher_i ‖ student_i). It overwrites ``log_teachers``."""
    log_ratio = log_teachers - log_student
    return log_ratio.mul_(log_teachers.exp_()).sum(dim=(-2, -1))


def _check(
    student: Tensor, teachers: Sequence[Tensor], temperature: float, chunk_size: int | None
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
    check_positive("temperature", temperature)
    if chunk_size is not None:
        check_whole("chunk_size", chunk_size, at_least=1, otherwise=" or None")
