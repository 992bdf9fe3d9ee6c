"""The metric losses of all spaces at once, by PML's own code on the block of their distances.

A loss that PML reduces row by row, or pair by pair, gives the same values on the distances of all
spaces together. Only the exact types listed here are computed so; ``branches`` computes every other
loss space by space.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor

from .similarity import cosine_block

# Losses over rows of the matrix, then losses over lists of pairs or triplets, each with the
# settings that all spaces must share.
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
SETTINGS = ROW_LOSSES | PAIR_LOSSES
DISTANCES = (
    distances.CosineSimilarity,
    distances.DotProductSimilarity,
    distances.LpDistance,
    distances.SNRDistance,
)
DISTANCE_SETTINGS = ("normalize_embeddings", "p", "power", "is_inverted")
METHODS = ("forward", "compute_loss", "_compute_loss", "mine")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def stackable(losses_: Sequence[Any], miners_: Sequence[Any]) -> bool:
    """Whether the losses of all spaces can be computed at once: their types and settings."""
    first = losses_[0]
    names = SETTINGS.get(type(first))
    if names is None or getattr(first, "triplets_per_anchor", "all") != "all":
        return False
    mined = type(first) is losses.MultiSimilarityLoss and _alike(
        miners_, miners.MultiSimilarityMiner, ("epsilon",)
    )
    return (
        _alike(losses_, type(first), names)
        and all(loss.embedding_regularizer is None for loss in losses_)
        and _same_distances([loss.distance for loss in losses_])
        and (
            all(miner is None for miner in miners_)
            or (mined and _same_distances([miner.distance for miner in miners_]))
        )
        and not any(_watched(module) for module in [*losses_, *miners_] if module is not None)
    )


def stacked_losses(
    losses_: Sequence[Any],
    miners_: Sequence[Any],
    spaces: Sequence[Tensor],
    labels: Tensor,
    indices_tuple: Any = None,
    cosines: Tensor | None = None,
) -> Tensor:
    """One metric loss a space, (len(spaces),).

    Args:
        losses_: of the spaces; ``stackable``.
        miners_: of the spaces, or None each.
        spaces: embeddings (B, d_i).
        labels: (B,).
        indices_tuple: pairs or triplets for all spaces, without a miner.
        cosines: ``cosine_block(spaces)``, if it is known.
    """
    loss, miner = losses_[0], miners_[0]
    block = _distances([loss.distance for loss in losses_], spaces, cosines)
    if type(loss) in PAIR_LOSSES:
        found = _by_pairs(loss, block, labels, indices_tuple)
    else:
        if miner is not None:
            with torch.no_grad():
                same = _settings(miner.distance) == _settings(loss.distance)
                mined_on = block if same else _distances([m.distance for m in miners_], spaces)
                masks = _mined(miner, mined_on.detach(), labels)
        else:
            masks = _all_pairs(loss, block[0], labels, indices_tuple)
        found = _by_rows(loss, block, masks)
    values = [
        _reduced([_reducer(loss, name) for loss in losses_], name, *entry, spaces, labels)
        for name, entry in found.items()
    ]
    return values[0] if len(values) == 1 else torch.stack(values).sum(dim=0)


def agrees_with_pml(loss: Any, miner: Any) -> bool:
    """Whether values and gradients are those of PML's own call, on a small fixed batch."""
    two = [copy.deepcopy(loss), copy.deepcopy(loss)]
    two_miners = [copy.deepcopy(miner), copy.deepcopy(miner)]
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    spaces = [
        torch.arange(8.0 * d, dtype=torch.float64).view(8, d).mul(d).sin().requires_grad_()
        for d in (3, 5)
    ]
    try:
        ours = stacked_losses(two, two_miners, spaces, labels)
        pml = [
            loss(x, labels, None if miner is None else miner(x, labels))
            for loss, miner, x in zip(two, two_miners, spaces, strict=True)
        ]
        results = [
            [*values, *torch.autograd.grad(values[0] + 2 * values[1], spaces)]
            for values in (ours, pml)
        ]
    except Exception:
        return False
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(*results, strict=True))


def _alike(modules: Sequence[Any], kind: type, names: tuple[str, ...]) -> bool:
    return all(
        type(m) is kind and all(getattr(m, n) == getattr(modules[0], n) for n in names)
        for m in modules
    )


def _same_distances(found: Sequence[Any]) -> bool:
    return type(found[0]) in DISTANCES and all(_settings(d) == _settings(found[0]) for d in found)


def _settings(distance: Any) -> tuple[Any, ...]:
    return (type(distance), *(getattr(distance, name) for name in DISTANCE_SETTINGS))


def _watched(module: Any) -> bool:
    """Whether somebody looks at its calls, or changed them: it must be called, then."""
    return any(
        getattr(m, "collect_stats", False)
        or any(getattr(m, hooks) for hooks in HOOKS)
        or any(name in m.__dict__ for name in METHODS)
        for m in module.modules()
    )


def is_cosine(distance: Any) -> bool:
    """Whether its matrix is that of the cosine similarities."""
    return type(distance) is distances.CosineSimilarity and (distance.p, distance.power) == (2, 1)


def _distances(
    kinds: Sequence[Any], spaces: Sequence[Tensor], cosines: Tensor | None = None
) -> Tensor:
    """The matrices of all spaces, (len(spaces), B, B)."""
    if is_cosine(kinds[0]):
        return cosine_block(spaces) if cosines is None else cosines
    return torch.stack([distance(x) for distance, x in zip(kinds, spaces, strict=True)])


def _same_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All positive and all negative pairs of a batch, as masks (B, B)."""
    same = labels[:, None] == labels
    return same.clone().fill_diagonal_(False), ~same


def _all_pairs(loss: Any, matrix: Tensor, labels: Tensor, indices_tuple: Any) -> tuple[Any, ...]:
    """The pairs that PML would take, as masks (B, B)."""
    if indices_tuple is None:
        return _same_class(labels)
    a1, p, a2, n = losses.generic_pair_loss.lmu.convert_to_pairs(indices_tuple, labels)
    positive, negative = (torch.zeros_like(matrix, dtype=torch.bool) for _ in range(2))
    if len(a1) > 1 or len(a2) > 1:  # fewer count as none
        positive[a1, p] = True
        negative[a2, n] = True
    loss._assert_either_pos_or_neg(positive, negative)
    return positive, negative


def _mined(miner: Any, block: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """MultiSimilarityMiner: pairs that a row's hardest opponent comes within epsilon of."""
    positive, negative = _same_class(labels)
    similarities = block if miner.distance.is_inverted else -block
    limit = torch.finfo(block.dtype)
    lowest = similarities.masked_fill(~positive, limit.max).amin(dim=-1, keepdim=True)
    highest = similarities.masked_fill(~negative, limit.min).amax(dim=-1, keepdim=True)
    positive = positive & (similarities - miner.epsilon < highest)
    negative = negative & (similarities + miner.epsilon > lowest)
    counts = torch.maximum(positive.sum(dim=(1, 2)), negative.sum(dim=(1, 2)))
    enough = (counts > 1)[:, None, None]  # PML takes a single pair for none
    return positive & enough, negative & enough


def _by_rows(loss: Any, block: Tensor, masks: tuple[Tensor, Tensor]) -> dict[str, tuple[Any, ...]]:
    """PML's losses by name: (len(block), B, ...), their indices in a space, and their kind."""
    dtype = block.dtype if type(loss) is losses.SupConLoss else torch.bool  # it adds masks up
    positive, negative = (m.to(dtype).expand_as(block).flatten(0, 1) for m in masks)
    found = loss._compute_loss(block.flatten(0, 1), positive, negative)
    own = torch.arange(block.shape[1], device=block.device)
    return {
        name: (_of_spaces(entry["losses"], block), own, entry["reduction_type"])
        for name, entry in found.items()
    }


def _by_pairs(
    loss: Any, block: Tensor, labels: Tensor, indices_tuple: Any
) -> dict[str, tuple[Any, ...]]:
    """The same for pairs or triplets, which are listed once for all spaces."""
    if indices_tuple is None:
        lister = losses.generic_pair_loss.lmu
        triplets = type(loss) is losses.TripletMarginLoss
        list_all = lister.get_all_triplets_indices if triplets else lister.get_all_pairs_indices
        indices_tuple = list_all(labels)
    entries: dict[str, Any] = {}

    def one_space(matrix: Tensor) -> dict[str, Tensor]:
        on_matrix = _OnMatrix(loss)
        entries.update(
            type(loss).compute_loss(on_matrix, matrix, labels, indices_tuple, None, None)
        )
        return {name: e["losses"] for name, e in entries.items() if isinstance(e["losses"], Tensor)}

    values = torch.func.vmap(one_space)(block)
    return {
        name: (_of_spaces(values.get(name), block), entry["indices"], entry["reduction_type"])
        for name, entry in entries.items()
    }


def _of_spaces(values: Any, block: Tensor) -> Tensor:
    """(len(block), ...); PML's number 0, for a batch without pairs, becomes no values."""
    if not isinstance(values, Tensor):
        return block.flatten(1)[:, :0]
    return values.reshape(len(block), -1, *values.shape[2:])


class _OnMatrix:
    """A loss whose distance hands back the matrix that it is given in place of embeddings."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.distance = _Given(loss.distance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)


class _Given:
    def __init__(self, distance: Any) -> None:
        self._distance = distance

    def __call__(self, matrix: Tensor, _: Tensor | None = None) -> Tensor:
        return matrix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._distance, name)


def _reducer(loss: Any, name: str) -> Any:
    """Of one of the loss's terms."""
    reducer = loss.reducer
    if type(reducer) is reducers.MultipleReducers:
        return reducer.reducers[name] if name in reducer.reducers else reducer.default_reducer
    return reducer


def _reduced(
    kinds: Sequence[Any],
    name: str,
    values: Tensor,
    indices: Any,
    reduction_type: str,
    spaces: Sequence[Tensor],
    labels: Tensor,
) -> Tensor:
    """One scalar a space. PML's reducers read from the device, so the usual two are written out."""
    if values.shape[1] == 0:
        return values.sum(dim=1)
    kind = type(kinds[0])
    if all(type(k) is kind for k in kinds):
        if kind is reducers.MeanReducer:
            return values.flatten(1).mean(dim=1)
        if kind is reducers.AvgNonZeroReducer and all(k.low == 0 and k.high is None for k in kinds):
            kept = (values > 0).flatten(1)
            total = values.flatten(1).where(kept, values.new_zeros(())).sum(dim=1)
            return total / kept.sum(dim=1).clamp_min(1)
    return torch.stack(
        [
            reducer(
                {name: {"losses": v, "indices": indices, "reduction_type": reduction_type}},
                embeddings,
                labels,
            )
            for reducer, v, embeddings in zip(kinds, values, spaces, strict=True)
        ]
    )
