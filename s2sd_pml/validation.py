"""What S2SDLoss refuses, when it is built and for each batch.

A ``check_...`` function raises an ``S2SDError`` that reports the offending value and suggests
a fix.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.reducers import DoNothingReducer
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch import Tensor, nn

from .capture import FeatureCapture
from .cloning import embedding_size_of
from .counter import is_compiling
from .errors import (
    ArgumentError,
    BatchError,
    DistributedError,
    MissingFeaturesError,
    UnsupportedLossError,
)
from .heads import POOLINGS, input_width, is_linear

PML = "pytorch_metric_learning"
NO_PAIRS = tuple(
    getattr(losses, name)
    for name in (
        "InstanceLoss ManifoldLoss P2SGradLoss PNPLoss RankedListLoss SelfSupervisedLoss VICRegLoss"
    ).split()
    if hasattr(losses, name)
)

# --- numbers ----------------------------------------------------------------------------------


def check_whole(name: str, value: object, at_least: int, otherwise: str = "") -> None:
    """A whole number of at least ``at_least``; NumPy's count."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise ArgumentError(
            f"{name}={value!r} must be a whole number of at least {at_least}{otherwise}."
        )


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < inf:
        raise ArgumentError(f"{name}={value!r} must be a finite number above 0.")


def check_weight(name: str, value: Any, when: str = "") -> float:
    """A finite number of at least 0, returned as a float; a tensor of one element counts."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, Real) or isinstance(number, bool) or not 0 <= float(number) < inf:
        raise ArgumentError(f"{name}={value!r}{when} must be a finite number of at least 0.")
    return float(number)


def weight_at(name: str, schedule: Any, step: int) -> float:
    """A weight at a training step: the number itself, or what the schedule returns."""
    if callable(schedule):
        return check_weight(name, schedule(step), f" at step {step}")
    return check_weight(name, schedule)


# --- settings and parts -----------------------------------------------------------------------


def check_settings(loss_func: Any) -> None:
    """The scalar settings of an S2SDLoss. They may be assigned between steps: runs every step."""
    for name in ("distill_weight", "feature_distill_weight"):
        if not callable(getattr(loss_func, name)):
            weight_at(name, getattr(loss_func, name), 0)
    check_positive("temperature", loss_func.temperature)
    check_whole("feature_distill_delay", loss_func.feature_distill_delay, at_least=0)
    if loss_func.chunk_size is not None:
        check_whole("chunk_size", loss_func.chunk_size, at_least=1, otherwise=" or None")
    for name in ("exclude_self", "gather_distributed"):
        if not isinstance(getattr(loss_func, name), bool):
            raise ArgumentError(f"{name}={getattr(loss_func, name)!r} must be True or False.")
    check_pooling(loss_func.pooling)


def check_pooling(pooling: object) -> None:
    """A pooling known by name, or a callable."""
    if pooling not in POOLINGS and not callable(pooling):
        raise ArgumentError(
            f"pooling={pooling!r} is unknown. "
            "Use 'avg', 'avg+max' or a callable that maps features to (B, F)."
        )


def check_head_dims(dims: Sequence[int], name: str = "head_dims") -> tuple[int, ...]:
    """Whole numbers above 0, all different; returned as a tuple of int."""
    given = tuple(dims) if isinstance(dims, Iterable) and not isinstance(dims, str) else None
    if given is None or not all(
        isinstance(d, Integral) and not isinstance(d, bool) and d > 0 for d in given
    ):
        raise ArgumentError(
            f"{name}={dims!r} must be a sequence of whole numbers above 0, such as (512, 1024)."
        )
    if len(set(given)) < len(given):
        raise ArgumentError(
            f"{name}={given} repeats a dimension, and the dimension is the name of a space. "
            "Use neighbouring ones, such as (512, 513)."
        )
    return tuple(int(d) for d in given)


def check_parts(loss: Any, miner: Any, embedder: Any, trunk: Any, head: Any) -> None:
    """The types of the parts, and parts that exclude each other."""
    if isinstance(loss, type):
        raise ArgumentError(
            f"loss={loss.__name__} is a class. Pass an instance, {loss.__name__}(...), or a "
            f"factory lambda dim: {loss.__name__}(...)."
        )
    if not isinstance(loss, nn.Module) and not callable(loss):
        raise ArgumentError(
            f"loss={loss!r} must be a PML loss or a factory `embedding size -> loss`."
        )
    if miner is not None and not isinstance(miner, nn.Module):
        hint = " Pass an instance." if isinstance(miner, type) else ""
        raise ArgumentError(f"miner={miner!r} must be a PML miner or None.{hint}")
    if isinstance(miner, (nn.Linear, nn.Sequential, nn.modules.conv._ConvNd)):
        raise ArgumentError(
            f"miner={type(miner).__name__} is a layer of a model. Did you mean "
            "embedder=<the layer>, or trunk=<the trunk>?"
        )
    if isinstance(miner, DistributedMinerWrapper):
        raise UnsupportedLossError(
            "The miner is a DistributedMinerWrapper. Pass the miner inside it and "
            "S2SDLoss(..., gather_distributed=True): every space is then mined in the global batch."
        )
    if embedder is not None and trunk is not None:
        raise ArgumentError(
            f"Both embedder={type(embedder).__name__} and trunk={type(trunk).__name__} were given. "
            "Pass one: the embedder's input or the trunk's output are the features."
        )
    for name, module in (("embedder", embedder), ("trunk", trunk)):
        if module is not None and not isinstance(module, nn.Module):
            raise ArgumentError(
                f"{name}={module!r} must be an nn.Module, not {type(module).__name__}."
            )
    if not callable(head):
        raise ArgumentError(f"head={head!r} must be a callable (in_dim, out_dim) -> nn.Module.")


def check_feature_dim(
    given: Any, embedder: Any, trunk: Any, *, plain_pooling: bool, needed: bool
) -> int | None:
    """The feature dimension F, as given or as read off the embedder's first layer."""
    width = None if embedder is None else input_width(embedder)
    if given is not None:
        check_whole("feature_dim", given, at_least=1, otherwise=" or None")
        if plain_pooling and width not in (None, given) and is_linear(embedder):
            raise ArgumentError(
                f"feature_dim={given} but the embedder takes {width} features. Leave it out."
            )
        return int(given)
    if width is None and needed:
        seen = (
            f"it cannot be read off the first layer of the embedder {type(embedder).__name__}"
            if embedder is not None
            else f"it cannot be read off the trunk {type(trunk).__name__}"
            if trunk is not None
            else "neither embedder nor trunk was given"
        )
        raise ArgumentError(
            f"The feature dimension is unknown: {seen}. Pass embedder=<the nn.Linear that makes "
            "the embeddings>, or feature_dim=<width of the trunk's pooled output>."
        )
    return width


def check_head(head: Any, in_dim: int, out_dim: int) -> nn.Module:
    """What the ``head`` callable made is a module."""
    if not isinstance(head, nn.Module):
        raise ArgumentError(
            f"head({in_dim}, {out_dim}) returned {type(head).__name__}. It must return an "
            f"nn.Module that maps (B, {in_dim}) to (B, {out_dim})."
        )
    return head


def check_takes_pairs(loss: nn.Module, miner: Any) -> None:
    """A miner goes with a loss that takes pairs or triplets and has no miners of its own."""
    if miner is None:
        return
    mines = isinstance(loss, losses.MultipleLosses) and loss.miners is not None
    if mines or isinstance(loss, NO_PAIRS):
        why = "has miners of its own" if mines else "takes no pairs or triplets"
        raise ArgumentError(
            f"{type(loss).__name__} {why}, but miner={type(miner).__name__} was given. "
            "Leave the miner out."
        )


def check_supported(loss: nn.Module) -> None:
    """The base loss can work inside an S2SDLoss."""
    from .loss import S2SDLoss  # which imports this module

    for module in loss.modules():
        if isinstance(module, S2SDLoss):
            raise UnsupportedLossError(
                "The base loss is an S2SDLoss already. Wrap the loss once, and give all dimensions "
                "as head_dims."
            )
        if isinstance(module, DoNothingReducer):
            raise UnsupportedLossError(
                f"{type(loss).__name__} has a DoNothingReducer and returns a dict. Give it a "
                "reducer that returns a scalar, such as MeanReducer()."
            )
        if isinstance(module, DistributedLossWrapper):
            raise UnsupportedLossError(
                f"The base loss is wrapped in DistributedLossWrapper, which gathers embeddings but "
                f"not features. Pass the {type(module.loss).__name__} inside it and "
                "S2SDLoss(..., gather_distributed=True)."
            )


# --- the batch --------------------------------------------------------------------------------


def check_floating(x: Any, name: str) -> None:
    """A dense floating point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise BatchError(f"{name} must be a floating point tensor but is {seen}.")
    if x.layout is not torch.strided or x.is_nested:
        seen = "nested" if x.is_nested else f"of layout {x.layout}"
        raise BatchError(f"{name} must be a dense tensor but is {seen}. Make it dense first.")


def check_batch(
    embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, loss: nn.Module
) -> None:
    """Embeddings (B, D) and labels that fit the loss. Only float labels are read from a device."""
    if isinstance(indices_tuple, nn.Module) or getattr(indices_tuple, "ndim", 1) > 1:
        raise BatchError(
            f"indices_tuple is a {type(indices_tuple).__name__}. Pass what a miner returns; a "
            "miner goes into S2SDLoss(..., miner), features go into features=..."
        )
    check_floating(embeddings, "embeddings")
    for name, x in (("embeddings", embeddings), ("labels", labels)):
        if getattr(x, "is_meta", False):
            raise BatchError(f"{name} are on the meta device, without data. Use a real device.")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise BatchError(
            f"embeddings have shape {tuple(embeddings.shape)}. Pass (batch, embedding size), both "
            "above 0; skip empty batches (drop_last=True)."
        )
    if labels is not None:
        if isinstance(loss, losses.SelfSupervisedLoss):
            raise BatchError(
                "SelfSupervisedLoss takes no labels. Call loss_func(embeddings, ref_emb=...)."
            )
        check_labels(labels, len(embeddings), loss)
    if ref_emb is not None:
        if isinstance(loss, (losses.CrossBatchMemory, losses.MultipleLosses)):
            raise BatchError(
                f"{type(loss).__name__} takes no ref_emb. Leave it out; its reference embeddings "
                "are its own. An enqueue_mask is not for S2SDLoss: every row is distilled."
            )
        check_floating(ref_emb, "ref_emb")
        if ref_emb.ndim != 2:
            raise BatchError(f"ref_emb has shape {tuple(ref_emb.shape)}. Pass (references, size).")


def check_labels(labels: Any, batch: int, loss: nn.Module) -> None:
    """Labels (B,) for PML's losses; a custom loss gets whatever has B rows."""
    if not isinstance(labels, Tensor):
        raise BatchError(f"labels are {type(labels).__name__}. Pass torch.as_tensor(labels).")
    if labels.shape[:1] != (batch,) or (labels.ndim > 1 and takes_classes(loss)):
        raise BatchError(
            f"labels have shape {tuple(labels.shape)} but there are {batch} embeddings. "
            f"{type(loss).__name__} takes one class for each: pass labels of shape ({batch},)."
        )
    if labels.is_floating_point() and bool(labels.isnan().any()):
        count = int(labels.isnan().sum())
        raise BatchError(
            f"{count} of the {labels.numel()} labels are NaN, and NaN is no class. Leave "
            "those samples out."
        )


def takes_classes(loss: nn.Module) -> bool:
    """Whether PML's own code receives the labels, which must then be one class a sample."""
    if isinstance(loss, losses.MultipleLosses):
        return any(takes_classes(inner) for inner in loss.losses.children())
    return _package(type(loss).forward.__module__) == PML


def check_capture(capture: FeatureCapture | None, name: str) -> FeatureCapture:
    """There is a capture to take the features from."""
    if capture is None:
        raise MissingFeaturesError(
            f"No {name}: pass {name}=<features (B, F) or map (B, C, H, W)> to the loss, or build "
            "it with embedder=<module whose input is the features> or trunk=<module whose output "
            "is>. An unpickled loss has lost its capture: assign loss_func.capture = "
            "FeatureCapture(embedder)."
        )
    return capture


def check_rows(features: Any, embeddings: Tensor, name: str) -> None:
    """One row of features for each embedding, on the same device."""
    check_floating(features, name)
    if features.ndim == 0 or len(features) != len(embeddings):
        raise BatchError(
            f"{name} has shape {tuple(features.shape)} but there are {len(embeddings)} embeddings. "
            "Pass the features of the same batch, in the same order."
        )
    if features.device != embeddings.device:
        raise BatchError(
            f"{name} is on {features.device} and the embeddings are on {embeddings.device}. "
            f"Pass {name}.to({str(embeddings.device)!r})."
        )
    if not is_compiling() and features.is_inference() and torch.is_grad_enabled():
        raise MissingFeaturesError(
            f"{name} come from torch.inference_mode(), and the heads cannot be trained on such "
            f"tensors. Compute them under torch.no_grad(), or pass {name}.clone()."
        )


def check_width(pooled: Tensor, dim: int | None, shape: tuple[int, ...], name: str) -> None:
    """Pooled features have the width feature_dim, where that is known."""
    if dim is not None and pooled.shape[1] != dim:
        raise BatchError(
            f"{name} of shape {shape} has width {pooled.shape[1]} after pooling, but "
            f"feature_dim={dim}. Pass the features that the embedder takes, or build the loss with "
            f"feature_dim={pooled.shape[1]}."
        )


def check_gatherable(world_size: int, indices_tuple: Any, ref_emb: Any) -> None:
    """Nothing was given that cannot be gathered over ranks."""
    for name, value, fix in (
        ("indices_tuple", indices_tuple, "Pass the miner to S2SDLoss instead."),
        ("ref_emb", ref_emb, "Leave it out, or use gather_distributed=False."),
    ):
        if world_size > 1 and value is not None:
            raise DistributedError(
                f"{name} was given for this rank's batch, but gather_distributed=True works on the "
                f"global batch. {fix}"
            )


# --- errors and values of base losses ---------------------------------------------------------

SIZES = re.compile("size|shape|dimension|broadcast")
# What losses and miners raise for a batch that they do not take.
REFUSALS = (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)


def check_loss_value(value: Any, loss: nn.Module) -> None:
    """A base loss returned a scalar: a tensor of one element, or a number."""
    name = type(loss).__name__
    if isinstance(value, dict) and isinstance(loss, losses.BaseMetricLossFunction):
        raise UnsupportedLossError(
            f"{name} returned a dict with keys {sorted(value)}: its reducer does not reduce. Give "
            "it a reducer that returns a scalar, such as MeanReducer()."
        )
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UnsupportedLossError(
                f"{name} returned a tensor of shape {tuple(value.shape)}. A base loss must return "
                "a scalar: reduce it, for example with .mean()."
            )
        return
    try:
        float(value)
    except (TypeError, ValueError):
        seen = type(value).__name__
        if isinstance(value, dict):
            seen += f" with keys {sorted(map(str, value))}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            seen += f" of {', '.join(type(v).__name__ for v in value)}"
        raise UnsupportedLossError(
            f"{name} returned a {seen}. A base loss must return the loss alone, a scalar tensor; "
            "keep anything else as an attribute of the loss, such as self.accuracy."
        ) from None


def refused(
    error: Exception,
    loss: Any,
    miner: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    given: Iterable[str],
) -> BatchError | None:
    """The BatchError to raise for an error of a loss or its miner; None: re-raise it as it is.

    What PML's code refuses becomes a BatchError. Errors of custom code stay what they are, and get
    a note of where they came from (from Python 3.11); so do errors of the machine.
    """
    buffers = _sized_buffers(loss) if SIZES.search(str(error)) else []
    size = embedding_size_of(loss)
    odd = labels is not None and labels.dtype != torch.long
    odd |= size not in (None, embeddings.shape[1])
    odd |= "Class values" in str(error)  # PML's, for labels
    fix = "Call it as without S2SDLoss: pass only what this loss accepts."
    if size not in (None, embeddings.shape[1]):
        fix = f"The loss is made for embeddings of size {size}. {fix}"
    elif buffers:
        fix = (
            f"If its buffers ({', '.join(buffers)}) are made for one embedding size, pass S2SDLoss "
            f"a factory dim -> loss. {fix}"
        )
    if labels is not None and labels.dtype != torch.long:
        fix = f"Try labels.long(). {fix}"
    names = type(loss).__name__ + ("" if miner is None else f" with {type(miner).__name__}")
    seen = "no labels" if labels is None else f"labels {tuple(labels.shape)} {labels.dtype}"
    called = f"embeddings {tuple(embeddings.shape)}, {', '.join([seen, *given])}"
    if type(error) is RuntimeError and buffers:  # the copy for another embedding size is ours
        pass
    elif _of_custom_code(error):
        if sys.version_info >= (3, 11):
            error.add_note(f"Raised in {names}, which S2SDLoss called with {called}. {fix}")
        return None
    elif not isinstance(error, REFUSALS) and not (type(error) is RuntimeError and odd):
        return None
    return BatchError(
        f"{names} refused {called}. "
        f"{type(error).__name__}: {str(error) or 'an assertion failed'}. {fix}"
    )


def _sized_buffers(loss: Any) -> list[str]:
    """Names of the buffers of a custom loss that may be of the embedding size."""
    if not isinstance(loss, nn.Module) or _package(type(loss).__module__) == PML:
        return []
    return [n for n, b in loss.named_buffers() if b.ndim and b.is_floating_point()]


def _of_custom_code(error: Exception) -> bool:
    """Whether the error passed through code outside PML, PyTorch and this package."""
    known = {PML, "torch", _package(__name__), *sys.stdlib_module_names}
    traceback = error.__traceback__
    while traceback is not None:
        if _package(traceback.tb_frame.f_globals.get("__name__", "")) not in known:
            return True
        traceback = traceback.tb_next
    return False


def _package(module: str) -> str:
    return module.partition(".")[0]
