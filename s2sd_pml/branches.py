"""The metric losses of all spaces: at once where ``stacking`` can, else space by space."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn

from . import stacking
from .cloning import clone_loss, clone_miner, made_by
from .errors import BatchError, S2SDWarning, outside
from .refusals import check_loss_value, refused
from .similarity import full_precision


class Branch(nn.Module):
    """A space of its own: head g, or a prefix of the embeddings, with its own loss L and miner."""

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
        if embeddings.shape != (len(features), dim):
            raise BatchError(
                f"The head for dimension {dim} turned features of shape {tuple(features.shape)} "
                f"into {tuple(embeddings.shape)}. It must return ({len(features)}, {dim})."
            )
        return embeddings


def make_branch(head: nn.Module, dim: int, loss: Any, miner: nn.Module | None) -> Branch:
    """A branch with copies, for its dimension, of the loss (or what a factory makes) and miner."""
    own_loss = clone_loss(loss, dim) if isinstance(loss, nn.Module) else made_by(loss, dim)
    return Branch(head, own_loss, None if miner is None else clone_miner(miner))


class Batch(NamedTuple):
    """What metric losses are called with: the embeddings of every space, and the rest."""

    spaces: list[Tensor]
    refs: list[Tensor | None]  # reference embeddings of every space
    labels: Tensor | None = None
    indices_tuple: Any = None
    ref_labels: Tensor | None = None


class MetricLosses(NamedTuple):
    """The losses and miners of all spaces."""

    losses: list[Any]
    miners: list[Any]

    def agree_with_pml(self) -> bool:
        """Whether they can be stacked, and give PML's own values and gradients then."""
        loss, miner = self.losses[0], self.miners[0]
        if len(self.losses) < 2 or not stacking.stackable(self.losses, self.miners):
            return False
        if stacking.agrees_with_pml(loss, miner):
            return True
        warnings.warn(
            f"{type(loss).__name__} of pytorch-metric-learning "
            f"{pytorch_metric_learning.__version__} gives other values for all heads at once than "
            "for each alone. It is computed for each alone, which is slower.",
            S2SDWarning,
            stacklevel=outside(),
        )
        return False

    def can_stack(self, batch: Batch) -> bool:
        """Whether those of this batch can be computed at once."""
        return (
            batch.labels is not None
            and batch.labels.ndim == 1
            and batch.ref_labels is None
            and all(ref is None for ref in batch.refs)
            and len({(x.dtype, x.device) for x in batch.spaces}) == 1
            and (batch.indices_tuple is None or self.miners[0] is None)
            and stacking.stackable(self.losses, self.miners)
        )

    def stacked(self, batch: Batch, cosines: Tensor | None) -> Tensor:
        """(spaces,), by one call. ``cosines``: the similarities in every space, if known."""
        loss, labels = self.losses[0], batch.labels
        assert labels is not None
        try:
            return stacking.stacked_losses(
                *self, batch.spaces, labels.to(batch.spaces[0].device), batch.indices_tuple, cosines
            )
        except Exception as error:
            refusal = refused(error, loss, self.miners[0], batch.spaces[0], labels, ())
            if refusal is None:
                raise
            raise refusal from error

    def one_by_one(self, batch: Batch) -> Tensor:
        """(spaces,), each by its own loss and miner.

        Given pairs serve every space without miners; with miners, they serve the first space only.
        """
        values = []
        for k, miner in enumerate(self.miners):
            pairs = batch.indices_tuple if k == 0 or miner is None else None
            others = batch.labels, pairs, batch.refs[k], batch.ref_labels
            value = metric_loss(self.losses[k], miner, batch.spaces[k], *others)
            values.append(value.to(batch.spaces[0].dtype))
        return torch.stack(values)


def metric_loss(
    loss: Any,
    miner: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: Any = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    """L(embeddings) in float32 (float64 stays), autocast off: a scalar.

    In evaluation the queue of a CrossBatchMemory is left as it was.

    A given ``indices_tuple`` replaces the miner. Only what was given is passed on: PML compares
    ``ref_emb`` with ``embeddings`` by identity, and some losses take fewer arguments.
    """
    evaluates = not (loss.training and torch.is_grad_enabled())
    with (
        torch.autocast(embeddings.device.type, enabled=False),
        memories_kept(loss) if evaluates else contextlib.nullcontext(),
    ):
        same = ref_emb is embeddings
        embeddings = full_precision(embeddings)
        given: dict[str, Any] = {}
        if ref_emb is not None:
            given["ref_emb"] = embeddings if same else full_precision(ref_emb)
        if ref_labels is not None:
            given["ref_labels"] = ref_labels
        passed = [*given, *([] if indices_tuple is None else ["indices_tuple"])]
        try:
            if indices_tuple is None and miner is not None:
                indices_tuple = miner(embeddings, labels, **given)
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
    check_loss_value(value, loss)
    if not isinstance(value, Tensor):  # PML returns the number 0 where a batch holds no pairs
        return embeddings.sum() * 0 + float(value)
    scalar: Tensor = value.reshape(())
    return scalar


@contextlib.contextmanager
def memories_kept(loss: nn.Module) -> Iterator[None]:
    """Put the queue of every CrossBatchMemory back afterwards; what is called writes to a copy."""
    names = ("embedding_memory", "label_memory", "queue_idx", "has_been_filled")
    memories = [m for m in loss.modules() if isinstance(m, CrossBatchMemory)]
    before = [{name: getattr(m, name) for name in names} for m in memories]
    for m in memories:
        m.embedding_memory, m.label_memory = m.embedding_memory.clone(), m.label_memory.clone()
    try:
        yield
    finally:
        for m, values in zip(memories, before, strict=True):
            for name, value in values.items():
                setattr(m, name, value)
