"""What can be wrong with a batch, refused with the values seen and the mend."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn

from .capture import FeatureCapture
from .cloning import embedding_size_of
from .errors import BatchError, DistributedError, FeatureShapeError, MissingFeaturesError


def floating(x: Any, name: str) -> None:
    """Refuse what is not a floating point tensor, dense and with data."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise BatchError(f"{name} must be a floating point tensor but is {seen}.")
    if x.layout is not torch.strided or x.is_nested:
        seen = "nested" if x.is_nested else f"of layout {x.layout}"
        raise BatchError(f"{name} must be a dense tensor but is {seen}. Make it dense first.")


def batch(embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, loss: nn.Module) -> None:
    """Embeddings (B, D) with labels (B,) or none."""
    if isinstance(indices_tuple, nn.Module) or getattr(indices_tuple, "ndim", 1) > 1:
        raise BatchError(
            f"indices_tuple is a {type(indices_tuple).__name__}. Pass what a miner returns; a "
            "miner goes into S2SDLoss(..., miner), features go into features=..."
        )
    floating(embeddings, "embeddings")
    for name, x in (("embeddings", embeddings), ("labels", labels)):
        if getattr(x, "is_meta", False):
            raise BatchError(f"{name} are on the meta device, without data. Use a real device.")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise BatchError(
            f"embeddings have shape {tuple(embeddings.shape)}. Pass (batch, embedding size), both "
            "above 0; skip empty batches (drop_last=True)."
        )
    if labels is not None:
        if not isinstance(labels, Tensor):
            raise BatchError(f"labels are {type(labels).__name__}. Pass torch.as_tensor(labels).")
        if labels.shape != embeddings.shape[:1]:
            raise BatchError(
                f"labels have shape {tuple(labels.shape)} but there are {len(embeddings)} "
                f"embeddings. Pass labels of shape ({len(embeddings)},)."
            )
        if labels.is_floating_point() and bool(labels.isnan().any()):
            count = int(labels.isnan().sum())
            raise BatchError(
                f"{count} of the {len(labels)} labels are NaN, and NaN is no class. Leave "
                "those samples out."
            )
    if labels is not None and isinstance(loss, losses.SelfSupervisedLoss):
        raise BatchError(
            "SelfSupervisedLoss takes no labels. Call loss_func(embeddings, ref_emb=...)."
        )
    if ref_emb is not None:
        if isinstance(loss, (losses.CrossBatchMemory, losses.MultipleLosses)):
            raise BatchError(
                f"{type(loss).__name__} takes no ref_emb. Leave it out; its reference embeddings "
                "are its own. An enqueue_mask is not for S2SDLoss: every row is distilled."
            )
        floating(ref_emb, "ref_emb")
        if ref_emb.ndim != 2:
            raise BatchError(f"ref_emb has shape {tuple(ref_emb.shape)}. Pass (references, size).")


SIZES = re.compile("size|shape|dimension|broadcast")
# What losses and miners raise for a batch that they do not take.
REFUSALS = (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)


def is_refusal(error: Exception, loss: Any, embeddings: Tensor, labels: Tensor | None) -> bool:
    """Whether a loss refused its batch; a RuntimeError may be lack of memory, or the machine's."""
    odd = labels is not None and labels.dtype != torch.long
    odd |= embedding_size_of(loss) not in (None, embeddings.shape[1])
    odd |= bool(_sized_buffers(loss) and SIZES.search(str(error)))
    odd |= "Class values" in str(error)  # PML's, for labels
    return isinstance(error, REFUSALS) or (type(error) is RuntimeError and odd)


def _sized_buffers(loss: Any) -> list[str]:
    """Names of what a loss of one's own keeps beside parameters, perhaps of the embedding size."""
    if type(loss).__module__.startswith("pytorch_metric_learning") or not isinstance(
        loss, nn.Module
    ):
        return []
    return [n for n, b in loss.named_buffers() if b.ndim and b.is_floating_point()]


def refused(
    loss: Any,
    miner: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    given: Iterable[str],
    error: Exception,
) -> BatchError:
    """The error of a loss or its miner, with what it was called with."""
    names = type(loss).__name__ + ("" if miner is None else f" with {type(miner).__name__}")
    seen = "no labels" if labels is None else f"labels {tuple(labels.shape)} {labels.dtype}"
    mend = "It is called as without S2SDLoss: give it what it takes on its own, leave out the rest."
    size = embedding_size_of(loss)
    if size not in (None, embeddings.shape[1]):
        mend = f"The loss is made for embeddings of size {size}. {mend}"
    elif buffers := _sized_buffers(loss):
        mend = (
            f"If its buffers ({', '.join(buffers)}) are made for one embedding size, pass S2SDLoss "
            f"a factory dim -> loss. {mend}"
        )
    if labels is not None and labels.dtype != torch.long:
        mend = f"Try labels.long(). {mend}"
    return BatchError(
        f"{names} refused embeddings {tuple(embeddings.shape)}, {', '.join([seen, *given])}. "
        f"{type(error).__name__}: {str(error) or 'an assertion failed'}. {mend}"
    )


def captured(capture: FeatureCapture | None, embeddings: Tensor, name: str) -> Tensor:
    """The captured features of these embeddings."""
    if capture is None:
        raise MissingFeaturesError(
            f"No {name}: pass {name}=<features (B, F) or map (B, C, H, W)> to the loss, or build "
            "it with embedder=<module whose input is the features> or trunk=<module whose output "
            "is>. An unpickled loss has lost its capture: assign loss_func.capture = "
            "FeatureCapture(embedder)."
        )
    return capture.features_of(embeddings, name)


def same_rows(features: Any, embeddings: Tensor, name: str) -> None:
    """One row of features for each embedding, on the same device."""
    floating(features, name)
    if features.ndim == 0 or len(features) != len(embeddings):
        raise FeatureShapeError(
            f"{name} has shape {tuple(features.shape)} but there are {len(embeddings)} embeddings. "
            "Pass the features of the same batch, in the same order."
        )
    if features.device != embeddings.device:
        raise FeatureShapeError(
            f"{name} is on {features.device} and the embeddings are on {embeddings.device}. "
            f"Pass {name}.to({str(embeddings.device)!r})."
        )
    if features.is_inference() and torch.is_grad_enabled():
        raise MissingFeaturesError(
            f"{name} come from torch.inference_mode(), and the heads cannot be trained on such "
            f"tensors. Compute them under torch.no_grad(), or pass {name}.clone()."
        )


def width(pooled: Tensor, dim: int | None, shape: tuple[int, ...], name: str) -> None:
    """Pooled features of width feature_dim, where that is known."""
    if dim is not None and pooled.shape[1] != dim:
        raise FeatureShapeError(
            f"{name} of shape {shape} has width {pooled.shape[1]} after pooling, but "
            f"feature_dim={dim}. Pass the features that the embedder takes, or the right "
            "feature_dim."
        )


def gatherable(world_size: int, indices_tuple: Any, ref_emb: Any) -> None:
    """Refuse what cannot be brought together over ranks."""
    for name, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb)):
        if world_size > 1 and value is not None:
            raise DistributedError(
                f"{name} was given, of this rank's batch, but gather_distributed=True works on the "
                "global batch. "
                + (
                    "Pass the miner to S2SDLoss instead."
                    if name == "indices_tuple"
                    else "Leave it out, or use gather_distributed=False."
                )
            )
