"""Work that several losses of one batch have in common, done once.

All through public parts of PML: the ``distance`` of losses and miners, and ``indices_tuple``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from .kernel import products
from .uncompiled import uncompiled

TRIPLET_LOSSES = (losses.MarginLoss, losses.TripletMarginLoss)


class SharedIndices:
    """All pairs or triplets of a batch, for the losses that would each list them.

    Given as their ``indices_tuple`` they change nothing: the losses make the same ones.
    """

    def __init__(self, labels: Tensor | None, device: torch.device) -> None:
        self._labels = labels if labels is None else labels.to(device)
        self._made: dict[Any, tuple[Tensor, ...]] = {}

    def of(self, loss: nn.Module) -> tuple[Tensor, ...] | None:
        """What the loss would list for itself; None if that is neither all pairs nor triplets."""
        make = _lister(loss)
        if make is None or self._labels is None:
            return None
        if make not in self._made:
            self._made[make] = make(self._labels)
        return self._made[make]


def _lister(loss: nn.Module) -> Any:
    if getattr(type(loss), "forward", None) is not losses.BaseMetricLossFunction.forward:
        return None  # it may change the labels
    compute = getattr(type(loss), "compute_loss", None)
    if compute is losses.GenericPairLoss.compute_loss:
        return lmu.get_all_pairs_indices
    triplets = any(compute is cls.compute_loss for cls in TRIPLET_LOSSES)
    if triplets and getattr(loss, "triplets_per_anchor", None) == "all":
        return lmu.get_all_triplets_indices
    return None


class SharedDistance(BaseDistance):  # type: ignore[misc]
    """A distance that computes the matrix of a batch with itself once, for miner and loss."""

    _open = False
    _made: tuple[Tensor, Tensor, int] | None = None  # the batch, its matrix, the matrix's version

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within, the matrix of the last batch is kept; it is let go of at the end."""
        self._open = True
        try:
            yield
        finally:
            self._open, self._made = False, None

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        other = ref_emb is not None and ref_emb is not query_emb
        if other or not self._open or self.collect_stats or torch.is_inference_mode_enabled():
            return super().forward(query_emb, ref_emb)  # type: ignore[no-any-return]
        matrix = self._held(query_emb)
        if matrix is None:
            with torch.enable_grad():  # a miner asks without, a loss needs the gradient
                matrix = self.matrix(query_emb)
            self._made = query_emb, matrix, matrix._version
        # miners write into what they get
        return matrix if torch.is_grad_enabled() else matrix.detach().clone()

    def _held(self, embeddings: Tensor) -> Tensor | None:
        """The matrix, if it is that of these embeddings and no loss wrote into it."""
        made = self._made
        right = made is not None and made[0] is embeddings and made[1]._version == made[2]
        return made[1] if made is not None and right else None

    def matrix(self, embeddings: Tensor) -> Tensor:
        """The distances within a batch, with their gradient."""
        return super().forward(embeddings)  # type: ignore[no-any-return]

    def cosines(self, embeddings: Tensor) -> Tensor | None:
        """The cosine similarities of a batch, where they are what was computed last."""
        return None


class _SharedCosine(SharedDistance, CosineSimilarity):  # type: ignore[misc]
    def matrix(self, embeddings: Tensor) -> Tensor:
        if (self.p, self.power) != (2, 1):
            return super().matrix(embeddings)
        return gram(F.normalize(embeddings, dim=1))

    def cosines(self, embeddings: Tensor) -> Tensor | None:
        held = self._held(embeddings)
        return None if held is None or (self.p, self.power) != (2, 1) else held.detach()


class _SharedLp(SharedDistance, LpDistance):  # type: ignore[misc]
    pass


SHARED = {CosineSimilarity: _SharedCosine, LpDistance: _SharedLp}


def share_distance(loss: Any, miner: Any) -> None:
    """Let a loss and a miner of the same distance, both copies of our own, compute it once.

    Where the loss's distance is not known here, nothing is changed.
    """
    distance = getattr(loss, "distance", None)
    kind = SHARED.get(type(distance))
    if kind is None:
        return
    shared: Any = copy.deepcopy(distance)  # a factory's losses may hold the same one
    shared.__class__ = kind
    if miner is not None and _settings(getattr(miner, "distance", None)) == _settings(distance):
        miner.distance = shared
    loss.distance = shared


def _settings(distance: Any) -> tuple[Any, ...]:
    names = "normalize_embeddings p power is_inverted collect_stats".split()
    return (type(distance), *(getattr(distance, name, None) for name in names))


@uncompiled
def gram(x: Tensor) -> Tensor:
    """x @ x.T, whose two products in the backward pass are one."""
    return _Gram.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = x.new_empty(len(x), len(x))
        products(x, 0, len(x), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        both: Tensor = (grad + grad.T.contiguous()) @ x
        return both
