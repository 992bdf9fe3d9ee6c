"""The metric losses of all spaces: at once where ``stacking`` can, else space by space."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_metric_learning
import torch
from torch import Tensor, nn

from . import stacking
from .errors import DistributedWarning
from .guard import outside
from .similarity import full_precision
from .validation import check_head_output, check_loss_value, is_refusal, refused


class Branch(nn.Module):
    """An auxiliary branch: head g, its own loss L and its own miner."""

    def __init__(self, head: nn.Module, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.head = head
        self.loss = loss
        self.miner = miner

    def project(self, features: Tensor, dim: int) -> Tensor:
        """g(φ), (B, F) -> (B, dim), in the head's own precision."""
        parameter = next(self.head.parameters(), None)
        if parameter is not None:
            features = features.to(parameter.dtype)
        embeddings: Tensor = self.head(features)
        check_head_output(embeddings, features, dim)
        return embeddings


class Batch(NamedTuple):
    """What a metric loss is called with beside embeddings."""

    labels: Tensor | None = None
    indices_tuple: Any = None
    ref_labels: Tensor | None = None


def called(loss: Any, miner: Any) -> str:
    """The names of a loss and its miner."""
    return type(loss).__name__ + ("" if miner is None else f" with {type(miner).__name__}")


def stacks(losses: Sequence[Any], miners: Sequence[Any]) -> bool:
    """Whether the losses can be stacked and give PML's own values and gradients then."""
    if len(losses) < 2 or not stacking.stackable(losses, miners):
        return False
    if stacking.agrees_with_pml(losses[0], miners[0]):
        return True
    names = type(losses[0]).__name__ + (
        "" if miners[0] is None else f" with {type(miners[0]).__name__}"
    )
    warnings.warn(
        f"{names} of this pytorch-metric-learning {pytorch_metric_learning.__version__} gives other "
        "values for all spaces at once than space by space. It is computed space by space, which "
        "is slower.",
        S2SDWarning,
        stacklevel=outside(),
    )
    return False


def can_stack(
    losses: Sequence[Any], miners: Sequence[Any], spaces: Sequence[Tensor], refs: Any, batch: Batch
) -> bool:
    """Whether this batch's metric losses can be computed at once."""
    return (
        len(losses) > 1
        and batch.labels is not None
        and batch.labels.ndim == 1
        and batch.ref_labels is None
        and all(ref is None for ref in refs)
        and len({(x.dtype, x.device) for x in spaces}) == 1
        and (batch.indices_tuple is None or miners[0] is None)
        and stacking.stackable(losses, miners)
    )


def metric_losses(
    losses: Sequence[Any],
    miners: Sequence[Any],
    spaces: Sequence[Tensor],
    refs: Sequence[Tensor | None],
    batch: Batch,
) -> list[Tensor]:
    """One scalar a space, each by its own loss and miner.

    Given pairs serve every space without miners; with miners, they serve the first space only.
    """
    values = []
    for k, (loss, miner, x, ref) in enumerate(zip(losses, miners, spaces, refs, strict=True)):
        own = batch if k == 0 or miner is None else batch._replace(indices_tuple=None)
        values.append(metric_loss(loss, miner, x, own, ref))
    return values


def metric_loss(
    loss: Any, miner: Any, embeddings: Tensor, batch: Batch, ref_emb: Tensor | None = None
) -> Tensor:
    """L(embeddings) in float32 (float64 stays), autocast off: a scalar.

    A given ``indices_tuple`` replaces the miner. Only what was given is passed on: PML compares
    ``ref_emb`` with ``embeddings`` by identity, and some losses take fewer arguments.
    """
    labels, indices_tuple, ref_labels = batch
    with torch.autocast(embeddings.device.type, enabled=False):
        same = ref_emb is embeddings
        embeddings = full_precision(embeddings)
        given: dict[str, Any] = {}
        if ref_emb is not None:
            given["ref_emb"] = embeddings if same else full_precision(ref_emb)
        if ref_labels is not None:
            given["ref_labels"] = ref_labels
        try:
            if indices_tuple is None and miner is not None:
                indices_tuple = miner(embeddings, labels, **given)
            if indices_tuple is not None:
                given["indices_tuple"] = indices_tuple
            value: Any = (
                loss(embeddings, **given) if labels is None else loss(embeddings, labels, **given)
            )
        except Exception as error:
            if not is_refusal(error, loss, embeddings, labels):
                raise
            raise refused(loss, miner, embeddings, labels, list(given), error) from error
    return check_loss_value(value, loss, embeddings)
