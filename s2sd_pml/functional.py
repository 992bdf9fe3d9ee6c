"""Relational distillation: the KL divergence between rows of batch similarity matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, BatchError
from .kernel import distil
from .validation import check_positive, check_weight, check_whole


def relation_kl(
    student: Tensor,
    teachers: Sequence[Tensor],
    *,
    weights: Sequence[float],
    temperature: float = 1.0,
    exclude_self: bool = False,
    chunk_size: int | None = None,
    rows: tuple[int, int] | None = None,
    cosines: Sequence[Tensor | None] | None = None,
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
        cosines: for each teacher cos(t_j) (B, B) where it is known already, else None.

    Returns:
        total, a scalar with gradient with respect to ``student``, and the detached unweighted
        ``KL_j`` of shape (number of teachers,). All is computed in the student's precision, half
        precision in float32.

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
    cosines = [None] * len(teachers) if cosines is None else cosines
    shapes = [None if c is None else tuple(getattr(c, "shape", (type(c),))) for c in cosines]
    whole_batch = (len(student), len(student))
    if len(shapes) != len(teachers) or not set(shapes) <= {None, whole_batch}:
        raise BatchError(
            f"cosines have the shapes {shapes} for {len(teachers)} teachers. Pass all of it, "
            f"{whole_batch}, or None, for each."
        )
    start, stop = rows or (0, len(student))
    student = full_precision(student)
    with torch.autocast(student.device.type, enabled=False):
        total, per_teacher = distil(
            _unit_rows(student),
            tuple(float(w) for w in weights),
            temperature,
            exclude_self,
            chunk_size or stop - start,
            (start, stop),
            cosines,
            *(t.detach().to(student.dtype) for t in teachers),
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
            log_teacher = log_relations(teacher.detach().to(log_student.dtype))
            terms = log_teacher.exp() * (log_teacher - log_student)
            if exclude_self:
                own = torch.arange(stop - start, device=terms.device)
                terms = terms.index_put((own, own + start), terms.new_zeros(()))
            divergences.append(temperature**2 * terms.sum(dim=1).mean())
        per_teacher = torch.stack(divergences) if divergences else log_student.new_zeros(0)
        total = (per_teacher * per_teacher.new_tensor(list(weights))).sum()
    return total, per_teacher.detach()


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay, as the same tensor object."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unit_rows(x: Tensor) -> Tensor:
    return F.normalize(full_precision(x), dim=1)


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
            f"weights={weights!r} for {len(teachers)} teachers. Pass a list, one for each teacher."
        )
    for j, weight in enumerate(weights):
        check_weight(f"weights[{j}]", weight)
    check_positive("temperature", temperature)
    if chunk_size is not None:
        check_whole("chunk_size", chunk_size, at_least=1, otherwise=" or None")
    if rows is not None:
        pair = isinstance(rows, tuple) and [isinstance(r, int) for r in rows] == [True, True]
        if not pair or not 0 <= rows[0] < rows[1] <= len(student):
            raise ArgumentError(
                f"rows={rows!r} must be (start, stop), whole numbers of a part, not empty, of the "
                f"{len(student)} rows."
            )
