"""The metric losses of all spaces at once, by PML's own code on the block of their distances.

A loss that PML reduces row by row, or pair by pair, gives the same values on the distances of all
spaces together. Only the exact types listed here are computed so; ``branches`` computes every other
loss space by space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from .similarity import cosines

# Losses over rows of the matrix, then losses over lists of pairs or triplets; and what they are
# made of. Each with the settings that all spaces must share.
ROW_LOSSES: dict[type, tuple[str, ...]] = {
    losses.MultiSimilarityLoss: ("alpha", "beta", "base"),
    losses.GeneralizedLiftedStructureLoss: ("neg_margin", "pos_margin"),
    losses.CircleLoss: ("m", "gamma", "op", "on", "delta_p", "delta_n"),
    losses.SupConLoss: ("temperature",),
}
PAIR_LOSSES: dict[type, tuple[str, ...]] = {
    losses.ContrastiveLoss: ("neg_margin", "pos_margin"),
    losses.SignalToNoiseRatioContrastiveLoss: ("neg_margin", "pos_margin"),
    losses.NTXentLoss: ("temperature",),
    losses.TupletMarginLoss: ("margin", "scale"),
    losses.LiftedStructureLoss: ("neg_margin", "pos_margin"),
    losses.TripletMarginLoss: ("margin", "swap", "smooth_loss", "triplets_per_anchor"),
}
DISTANCE = ("normalize_embeddings", "p", "power", "is_inverted")
KNOWN: dict[type, tuple[str, ...]] = {
    **{
        kind: (*settings, "distance", "reducer", "embedding_regularizer")
        for kind, settings in (ROW_LOSSES | PAIR_LOSSES).items()
    },
    miners.MultiSimilarityMiner: ("epsilon", "distance"),
    distances.CosineSimilarity: DISTANCE,
    distances.DotProductSimilarity: DISTANCE,
    distances.LpDistance: DISTANCE,
    distances.SNRDistance: DISTANCE,
    reducers.MultipleReducers: ("reducers", "default_reducer"),
    reducers.MeanReducer: (),
    reducers.SumReducer: (),
    reducers.ThresholdReducer: ("low", "high"),
    reducers.AvgNonZeroReducer: ("low", "high"),
}
SUBTRACTED = 25  # rows up to which torch.cdist, and so LpDistance, subtracts them
MULTI_SIMILARITY = losses.MultiSimilarityLoss
CACHED = 2**18  # entries that a CPU works on at a time, so that they stay in its cache
METHODS = {kind: frozenset(n for n in dir(kind) if callable(getattr(kind, n))) for kind in KNOWN}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def stackable(losses: Sequence[Any], miners: Sequence[Any]) -> bool:
    """Whether the losses of all spaces can be computed at once: known types, the same settings."""
    first, miner = losses[0], miners[0]
    if miner is not None and type(first) is not MULTI_SIMILARITY:
        return False
    if getattr(first, "triplets_per_anchor", "all") != "all":  # they are drawn at random
        return False
    kind = (_signature(first), _signature(miner))
    others = zip(losses[1:], miners[1:], strict=True)
    return all((_signature(loss), _signature(miner)) == kind for loss, miner in others)


def stacked_losses(
    losses: Sequence[Any],
    miners: Sequence[Any],
    spaces: Sequence[Tensor],
    labels: Tensor,
    indices_tuple: Any = None,
    block: Tensor | None = None,
) -> Tensor:
    """One metric loss a space, (len(spaces),).

    Args:
        losses: of the spaces; ``stackable`` with the miners.
        miners: of the spaces, or None each.
        spaces: embeddings (B, d_i).
        labels: (B,).
        indices_tuple: pairs or triplets for all spaces, without a miner.
        block: the cosine similarities in every space, (spaces, B, B), if they are known.
    """
    loss, miner = losses[0], miners[0]
    matrices = _matrices(loss.distance, spaces, block)
    if type(loss) in PAIR_LOSSES:
        terms = _by_pairs(loss, matrices, labels, indices_tuple)
    else:
        pairs = _pairs(loss, matrices[0], labels, indices_tuple)
        mined_on = None
        if miner is not None:
            with torch.no_grad():
                same = _signature(miner.distance) == _signature(loss.distance)
                mined_on = matrices if same else _matrices(miner.distance, spaces, block)
                mined_on = mined_on.detach()
        terms = _by_rows(loss, matrices, pairs, miner, mined_on)
    values = [_reduced(_reducer(loss, name), term) for name, term in terms.items()]
    return values[0] if len(values) == 1 else torch.stack(values).sum(dim=0)


def agrees_with_pml(loss: Any, miner: Any) -> bool:
    """Whether values and gradients are those of PML's own calls, on a small fixed batch."""

    def with_gradients(values: Sequence[Tensor]) -> list[Tensor]:
        return [*values, *torch.autograd.grad(values[0] + 2 * values[1], spaces)]

    # A loss may be built under no_grad (which the first one ends, too), or on the meta device.
    with torch.inference_mode(False), torch.device("cpu"):
        loss, miner = copy.deepcopy(loss), copy.deepcopy(miner)
        labels = torch.tensor([0, *range(29)]) // 3  # uneven classes; more than SUBTRACTED rows
        numbers = [torch.arange(30.0 * d, dtype=torch.float64).view(30, d) for d in (3, 5)]
        spaces = [x.mul(x.shape[1]).sin().requires_grad_() for x in numbers]
        try:
            ours = with_gradients(stacked_losses([loss] * 2, [miner] * 2, spaces, labels).unbind())
            mined = [None if miner is None else miner(x, labels) for x in spaces]
            pml = [loss(x, labels, pairs) for x, pairs in zip(spaces, mined, strict=True)]
            return all(_close(a, b) for a, b in zip(ours, with_gradients(pml), strict=True))
        except Exception:
            return False


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.reshape(a.shape), rtol=1e-9, atol=1e-10, equal_nan=True)


def _signature(part: Any) -> Any:
    """Equal for parts that compute the same; what is not known here equals nothing."""
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    if isinstance(part, nn.ModuleDict):
        return tuple((name, _signature(child)) for name, child in part.items())
    if type(part) not in KNOWN or _is_watched(part):
        return object()
    return (type(part), *(_signature(getattr(part, name)) for name in KNOWN[type(part)]))


def _is_watched(module: Any) -> bool:
    """Whether somebody looks at its calls or replaced a method: then it must be called itself."""
    return bool(
        module.collect_stats
        or any(getattr(module, hooks) for hooks in HOOKS)
        or not METHODS[type(module)].isdisjoint(module.__dict__)
    )


def _matrices(distance: Any, spaces: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
    """The distances within the batch, in every space: (len(spaces), B, B)."""
    settings = tuple(getattr(distance, name) for name in ("normalize_embeddings", "p", "power"))
    euclidean = type(distance) is distances.LpDistance and len(spaces[0]) > SUBTRACTED
    cosine = type(distance) is distances.CosineSimilarity
    if settings != (True, 2, 1) or not (euclidean or cosine):
        return torch.stack([distance(x) for x in spaces])
    block = torch.stack([cosines(x) for x in spaces]) if known is None else known
    return _euclidean(block) if euclidean else block


def _euclidean(block: Tensor) -> Tensor:
    """|x - y| from x · y, as torch.cdist has it; where it is 0 it has no gradient."""
    squares = block.diagonal(dim1=1, dim2=2)
    between = torch.sub(squares[:, :, None] + squares[:, None], block, alpha=2)
    tiny = torch.finfo(block.dtype).tiny  # a power of 4: its root is exact
    return between.clamp_min(tiny).sqrt() - math.sqrt(tiny)


def _pairs(loss: Any, matrix: Tensor, labels: Tensor, indices_tuple: Any) -> tuple[Tensor, Tensor]:
    """All pairs, or those given, as masks (B, B) of positive and of negative ones."""
    if indices_tuple is None:
        same = labels[:, None] == labels
        return same.clone().fill_diagonal_(False), ~same
    a1, p, a2, n = lmu.convert_to_pairs(indices_tuple, labels)
    positive, negative = (torch.zeros_like(matrix, dtype=torch.bool) for _ in range(2))
    if len(a1) > 1 or len(a2) > 1:  # PML takes a single pair for none
        positive[a1, p] = True
        negative[a2, n] = True
    if hasattr(loss, "_assert_either_pos_or_neg"):  # from PML 2.9 on
        loss._assert_either_pos_or_neg(positive, negative)
    return positive, negative


def _mined(miner: Any, matrix: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """MultiSimilarityMiner's choice of pairs; matrix and masks are (rows, B).

    A positive pair counts if it is less similar than the row's most similar negative plus ε, a
    negative one if it is more similar than the row's least similar positive minus ε.
    """
    similar = matrix if miner.distance.is_inverted else -matrix
    limit = torch.finfo(matrix.dtype)
    lowest = similar.masked_fill(~positive, limit.max).amin(dim=1, keepdim=True)
    highest = similar.masked_fill(~negative, limit.min).amax(dim=1, keepdim=True)
    hard_positive = positive & (similar - miner.epsilon < highest)
    return hard_positive, negative & (similar + miner.epsilon > lowest)


def _by_rows(
    loss: Any, block: Tensor, pairs: tuple[Tensor, Tensor], miner: Any, mined_on: Tensor | None
) -> dict[str, Tensor]:
    """PML's losses of every row, by name of the term: (spaces, B)."""
    height = block.shape[0] * block.shape[1]
    sums_masks = type(loss) is losses.SupConLoss  # and takes no row for itself
    if block.device.type == "cpu" and not sums_masks:
        height = max(CACHED // block.shape[1], 1)
    every = (block, block if mined_on is None else mined_on, *pairs)
    parts = (torch.split(x.expand_as(block).flatten(0, 1), height) for x in every)
    terms, counts = [], []
    for rows, mined_rows, positive, negative in zip(*parts, strict=True):
        if miner is not None:
            positive, negative = _mined(miner, mined_rows, positive, negative)
            counts.append(torch.stack([positive.sum(dim=1), negative.sum(dim=1)]))
        if sums_masks:
            positive, negative = positive.to(rows.dtype), negative.to(rows.dtype)
        terms.append(loss._compute_loss(rows, positive, negative))
    found = {n: _of_spaces([t[n]["losses"] for t in terms], block) for n in terms[0]}
    if counts:  # PML takes a single pair for none
        enough = torch.cat(counts, dim=1).view(2, len(block), -1).sum(dim=2).amax(dim=0) > 1
        found = {n: v.where(enough[:, None], v.new_zeros(())) for n, v in found.items()}
    return found


def _by_pairs(loss: Any, block: Tensor, labels: Tensor, indices_tuple: Any) -> dict[str, Tensor]:
    """The same of every pair or triplet, which are listed once: (spaces, pairs)."""
    if indices_tuple is None:
        triplets = type(loss) is losses.TripletMarginLoss
        every: Callable[..., Any] = (
            lmu.get_all_triplets_indices if triplets else lmu.get_all_pairs_indices
        )
        indices_tuple = every(labels)
    compute_loss = type(loss).compute_loss
    without_values: set[str] = set()

    def one_space(matrix: Tensor) -> dict[str, Tensor]:
        terms = compute_loss(_OnMatrix(loss), matrix, labels, indices_tuple, None, None)
        values = {name: term["losses"] for name, term in terms.items()}
        without_values.update(n for n, v in values.items() if not isinstance(v, Tensor))
        return {n: v.flatten() for n, v in values.items() if isinstance(v, Tensor)}

    terms = torch.func.vmap(one_space)(block)
    return {**terms, **{name: _of_spaces([0], block) for name in without_values}}


def _of_spaces(values: list[Any], block: Tensor) -> Tensor:
    """(spaces, values); PML's number 0, for a batch without pairs, becomes no values."""
    if not isinstance(values[0], Tensor):
        return block.flatten(1)[:, :0]
    return torch.cat(values).view(len(block), -1)


class _OnMatrix:
    """A loss whose distance returns the matrix that is passed to it in place of embeddings."""

    def __init__(self, part: Any, is_distance: bool = False) -> None:
        self._part = part
        if not is_distance:
            self.distance = _OnMatrix(part.distance, is_distance=True)

    def __call__(self, matrix: Tensor, _: Tensor | None = None) -> Tensor:
        return matrix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _reducer(loss: Any, name: str) -> Any:
    """The reducer of one of the loss's terms."""
    reducer = loss.reducer
    if type(reducer) is reducers.MultipleReducers:
        return dict(reducer.reducers.items()).get(name, reducer.default_reducer)
    return reducer


def _reduced(reducer: Any, values: Tensor) -> Tensor:
    """PML's reduction in every space, which reads nothing back: (spaces, n) -> (spaces,)."""
    if values.shape[1] == 0 or type(reducer) is reducers.SumReducer:
        return values.sum(dim=1)
    if type(reducer) is reducers.MeanReducer:
        return values.mean(dim=1)
    kept = torch.ones_like(values, dtype=torch.bool)
    if reducer.low is not None:
        kept = values > reducer.low
    if reducer.high is not None:
        kept = kept & (values < reducer.high)
    return values.where(kept, values.new_zeros(())).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
