"""One metric-learning branch: a loss and a miner in one embedding space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .errors import BatchError
from .functional import full_precision
from .refusals import refused
from .sharing import SharedDistance, SharedIndices, share_distance


class Branch(nn.Module):
    """An auxiliary branch: head g, its own loss L and its own miner.

    The head may run under autocast; loss and miner never do.
    """

    def __init__(self, head: nn.Module, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.head = head
        self.loss = loss
        self.miner = miner
        share_distance(loss, miner)

    def project(self, features: Tensor, dim: int) -> Tensor:
        """g(φ), (B, F) -> (B, dim), in the head's own precision."""
        parameter = next(self.head.parameters(), None)
        if parameter is not None:
            features = features.to(parameter.dtype)
        embeddings: Tensor = self.head(features)
        if embeddings.shape != (len(features), dim):
            raise BatchError(
                f"The head for dimension {dim} turned features of shape {tuple(features.shape)} "
                f"into {tuple(embeddings.shape)}. It must return ({len(features)}, {dim})."
            )
        return embeddings

    def metric_loss(self, embeddings: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
        """L(g(φ)), and cos(g(φ)) where loss or miner computed that: once for both."""
        distance = getattr(self.loss, "distance", None)
        if not isinstance(distance, SharedDistance):
            return metric_loss(self.loss, self.miner, embeddings, *args), None
        with distance.sharing():
            return metric_loss(self.loss, self.miner, embeddings, *args), distance.cosines(
                embeddings
            )


def metric_loss(
    loss: Any,
    miner: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: Any = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    listed: SharedIndices | None = None,
) -> Tensor:
    """L(embeddings) in float32 (float64 stays), autocast off: a scalar.

    A given ``indices_tuple`` replaces the miner. Without either, what the loss would list for
    itself is taken from ``listed``. Only what was given is passed on: PML compares ``ref_emb`` with
    ``embeddings`` by identity, and some losses take fewer arguments.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        same = ref_emb is embeddings
        named = {"ref_emb": ref_emb, "ref_labels": ref_labels, "indices_tuple": indices_tuple}
        passed = [name for name, value in named.items() if value is not None]
        embeddings = full_precision(embeddings)
        given: dict[str, Any] = {}
        if ref_emb is not None:
            given["ref_emb"] = embeddings if same else full_precision(ref_emb)
        if ref_labels is not None:
            given["ref_labels"] = ref_labels
        try:
            if indices_tuple is None and miner is not None:
                indices_tuple = miner(embeddings, labels, **given)
            elif indices_tuple is None and listed is not None and ref_emb is None:
                indices_tuple = listed.of(loss)
            if indices_tuple is not None:
                given["indices_tuple"] = indices_tuple
            value: Any = (
                loss(embeddings, **given) if labels is None else loss(embeddings, labels, **given)
            )
        except Exception as error:
            refusal = refused(error, loss, miner, embeddings, labels, passed)
            if refusal is None:
                raise
            raise refusal from error
    validation.check_loss_value(value, loss)
    if not isinstance(value, Tensor):  # PML returns the number 0 where a batch holds no pairs
        return embeddings.sum() * 0 + float(value)
    scalar: Tensor = value.reshape(())
    return scalar
