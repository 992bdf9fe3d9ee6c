"""What is refused when an S2SDLoss is built and for each batch.

``check_...`` raises an S2SDError whose message reports the offending value and suggests a fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.reducers import DoNothingReducer
from pytorch_metric_learning.utils import distributed
from torch import Tensor, nn

from .capture import FeatureCapture
from .counter import is_compiling
from .errors import ArgumentError, BatchError, MissingFeaturesError
from .errors import UnsupportedLossError as Unsupported
from .heads import POOLINGS, input_width, is_linear
from .rows import parameters_behind

PML = "pytorch_metric_learning"
NO_PAIRS = "Instance Manifold P2SGrad PNP RankedList SelfSupervised VICReg"
LOSSES_WITHOUT_PAIRS = tuple(getattr(losses, f"{name}Loss") for name in NO_PAIRS.split())
LAYERS = (nn.Linear, nn.Sequential, nn.modules.conv._ConvNd)


def check_whole(name: str, value: object, at_least: int, otherwise: str = "") -> None:
    """A whole number of at least ``at_least``; NumPy's count."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise _must_be(name, value, f"a whole number of at least {at_least}{otherwise}")


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < inf:
        raise _must_be(name, value, "a finite number above 0")


def check_weight(name: str, value: Any, when: str = "") -> float:
    """A finite number of at least 0, returned as a float; a tensor or array of one counts."""
    is_scalar = value.numel() == 1 if isinstance(value, Tensor) else getattr(value, "ndim", 1) == 0
    number = value.item() if is_scalar else value
    if not isinstance(number, Real) or isinstance(number, bool) or not 0 <= float(number) < inf:
        raise _must_be(name, value, "a finite number of at least 0", when)
    return float(number)


def check_settings(loss_func: Any) -> None:
    """The scalar settings of an S2SDLoss. Runs every step: they may be assigned in between."""
    names = ("distill_weight", "feature_distill_weight", "teacher_weight")
    weights = {name: getattr(loss_func, name) for name in names}
    if isinstance(loss_func.teacher_weight, Mapping):
        of_each = weights.pop("teacher_weight")
        if not all(isinstance(teacher, str) for teacher in of_each):
            raise _must_be("teacher_weight", of_each, "a dict whose keys are the teachers' names")
        weights |= {f"teacher_weight[{t!r}]": weight for t, weight in of_each.items()}
    for name, weight in weights.items():
        if not callable(weight):
            check_weight(name, weight)
    check_positive("temperature", loss_func.temperature)
    check_whole("feature_distill_delay", loss_func.feature_distill_delay, at_least=0)
    if loss_func.chunk_size is not None:
        check_whole("chunk_size", loss_func.chunk_size, at_least=1, otherwise=" or None")
    for name in ("exclude_self", "gather_distributed"):
        if not isinstance(getattr(loss_func, name), bool):
            raise _must_be(name, getattr(loss_func, name), "True or False")
    if loss_func.pooling not in POOLINGS and not callable(loss_func.pooling):
        what = "'avg', 'avg+max' or a callable that maps features to (B, F)"
        raise _must_be("pooling", loss_func.pooling, what)


def check_dims(
    name: str, dims: Sequence[int], fix: str = "Use neighbouring ones, such as (512, 513)"
) -> tuple[int, ...]:
    """Whole numbers above 0, all different; returned as a tuple of int."""
    given = tuple(dims) if isinstance(dims, Iterable) and not isinstance(dims, str) else (None,)
    if not all(isinstance(d, Integral) and not isinstance(d, bool) and d > 0 for d in given):
        example = "(512, 1024)" if name == "head_dims" else "(16, 32)"
        raise _must_be(name, dims, f"a sequence of whole numbers above 0, such as {example}")
    if len(set(given)) < len(given):
        raise ArgumentError(f"{name}={given} repeats a dimension. All must be different. {fix}.")
    return tuple(int(d) for d in given)


def check_matryoshka_dims(dims: Sequence[int], size: int | None) -> tuple[int, ...]:
    """Sizes of prefixes, each once and below the embedding size, where that is known."""
    dims = check_dims("matryoshka_dims", dims, "Give each once")
    if size is not None and (odd := [d for d in dims if d >= size]):
        why = "is included already" if odd == [size] else f"has no prefix of size {max(odd)}"
        raise ArgumentError(
            f"matryoshka_dims={dims}, but the whole embedding, of size {size}, {why}. Build "
            f"S2SDLoss(..., matryoshka_dims={tuple(d for d in dims if d < size)})."
        )
    return dims


def check_parts(loss: Any, miner: Any, embedder: Any, trunk: Any, head: Any) -> None:
    """The types of the parts, and parts that exclude each other."""
    for part, given in (("loss", loss), ("miner", miner)):
        if isinstance(given, type):
            factory = f", or a factory lambda dim: {given.__name__}(...)" if part == "loss" else ""
            name = given.__name__
            raise ArgumentError(
                f"{part}={name} is a class. Pass an instance, {name}(...){factory}."
            )
    if not callable(loss):  # a module is
        raise _must_be("loss", loss, "a PML loss or a factory `embedding size -> loss`")
    if miner is not None and not isinstance(miner, nn.Module):
        raise _must_be("miner", miner, "a PML miner, such as MultiSimilarityMiner(), or None")
    if isinstance(miner, LAYERS):
        raise ArgumentError(
            f"miner={type(miner).__name__} is a layer of a model. Did you mean "
            "embedder=<the layer>, or trunk=<the trunk>?"
        )
    if isinstance(miner, distributed.DistributedMinerWrapper):
        raise Unsupported(
            "The miner is a DistributedMinerWrapper. Pass the miner inside it and "
            "S2SDLoss(..., gather_distributed=True): every space is then mined in the global batch."
        )
    for part, module in (("embedder", embedder), ("trunk", trunk)):
        if module is not None and not isinstance(module, nn.Module):
            raise _must_be(part, module, f"an nn.Module, not {type(module).__name__}")
    if embedder is not None and trunk is not None:
        raise ArgumentError(
            f"Both embedder={type(embedder).__name__} and trunk={type(trunk).__name__} were given. "
            "Pass one: the embedder's input or the trunk's output are the features."
        )
    if not callable(head):
        raise _must_be("head", head, "a callable (in_dim, out_dim) -> nn.Module")


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
        part, module = ("embedder", embedder) if embedder is not None else ("trunk", trunk)
        seen = f"it cannot be read off the {part} {type(module).__name__}"
        raise ArgumentError(
            "The feature dimension is unknown: "
            f"{seen if module is not None else 'neither embedder nor trunk was given'}. Pass "
            "embedder=<the nn.Linear that makes the embeddings>, or feature_dim=<width of the "
            "trunk's pooled output>."
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
    mines = isinstance(loss, losses.MultipleLosses) and loss.miners is not None
    if miner is not None and (mines or isinstance(loss, LOSSES_WITHOUT_PAIRS)):
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
            raise Unsupported(
                "The base loss is an S2SDLoss already. Wrap the loss once, and give all dimensions "
                "as head_dims."
            )
        if isinstance(module, DoNothingReducer):
            raise Unsupported(
                f"{type(loss).__name__} has a DoNothingReducer and returns a dict. Give it a "
                "reducer that returns a scalar, such as MeanReducer()."
            )
        if isinstance(module, distributed.DistributedLossWrapper):
            raise Unsupported(
                "The base loss is in a DistributedLossWrapper, which gathers no features. Pass the "
                f"{type(module.loss).__name__} inside and S2SDLoss(..., gather_distributed=True)."
            )


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
    if embeddings.is_meta or getattr(labels, "is_meta", False):
        name = "embeddings" if embeddings.is_meta else "labels"
        raise BatchError(f"{name} are on the meta device, without data. Use a real device.")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise BatchError(
            f"embeddings have shape {tuple(embeddings.shape)}. Pass (batch, embedding size), both "
            "above 0; skip empty batches (drop_last=True)."
        )
    if labels is not None:
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
    if isinstance(loss, losses.SelfSupervisedLoss):
        raise BatchError(
            "SelfSupervisedLoss takes no labels. Call loss_func(embeddings, ref_emb=...)."
        )
    if not isinstance(labels, Tensor):
        raise BatchError(f"labels are {type(labels).__name__}. Pass torch.as_tensor(labels).")
    if labels.shape[:1] != (batch,) or (labels.ndim > 1 and takes_classes(loss)):
        raise BatchError(
            f"labels have shape {tuple(labels.shape)} but there are {batch} embeddings. "
            f"{type(loss).__name__} takes one class for each: pass labels of shape ({batch},)."
        )
    if labels.is_floating_point() and bool(labels.isnan().any()):
        raise BatchError(
            f"{int(labels.isnan().sum())} of the {labels.numel()} labels are NaN, and NaN is no "
            "class. Leave those samples out."
        )


def takes_classes(loss: nn.Module) -> bool:
    """Whether it is PML's code that receives the labels, which must be one class a sample."""
    if isinstance(loss, losses.MultipleLosses):
        return any(takes_classes(inner) for inner in loss.losses.children())
    return package_of(type(loss).forward.__module__) == PML


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


def check_one_tower(embeddings: Tensor, ref_emb: Tensor, labels: Tensor | None) -> None:
    """The references come from the embedder of the embeddings, as far as their graphs show it.

    A shared number, such as CLIP's logit scale, does not make two towers one.
    """
    if is_compiling():
        return
    last = (parameters_behind(x) for x in (embeddings, ref_emb))
    own, other = ({id(p) for p in layers if p.ndim > 1} for layers in last)
    if own and other and not own & other:
        both, loss = "torch.cat([labels, ref_labels])", ""
        if labels is None:
            both, loss = f"torch.arange({len(ref_emb)}).repeat(2)", " a loss that takes labels,"
        raise BatchError(
            f"ref_emb of shape {tuple(ref_emb.shape)} comes from another embedder than the "
            "embeddings: their last layers share no weight. One head would be applied to the "
            "features of both towers. Stack the towers instead, each with columns of its own: "
            f"loss_func(torch.cat([embeddings, ref_emb]), {both}, features="
            f"torch.block_diag(features, ref_features)), built with{loss} feature_dim=<both widths "
            "together> and feature_distill_weight=0. See 'Two towers' in docs/works-with.md."
        )


def check_rows(features: Any, embeddings: Tensor, name: str) -> None:
    """One row of features for each embedding, on the same device."""
    check_floating(features, name)
    if features.ndim == 0 or len(features) != len(embeddings):
        raise BatchError(
            f"{name} has shape {tuple(features.shape)} but there are {len(embeddings)} embeddings. "
            "Pass the features of the same batch, in the same order."
        )
    check_device(features, embeddings, name)
    if not is_compiling() and features.is_inference() and torch.is_grad_enabled():
        raise MissingFeaturesError(
            f"{name} come from torch.inference_mode(), and the heads cannot be trained on such "
            f"tensors. Compute them under torch.no_grad(), or pass {name}.clone()."
        )


def check_device(x: Tensor, embeddings: Tensor, name: str) -> None:
    """The device of the embeddings."""
    if x.device != embeddings.device:
        raise BatchError(
            f"{name} is on {x.device} and the embeddings are on {embeddings.device}. "
            f"Pass {name}.to({str(embeddings.device)!r})."
        )


def check_width(pooled: Tensor, dim: int | None, shape: tuple[int, ...], name: str) -> None:
    """Pooled features have the width feature_dim, where that is known."""
    if dim is not None and pooled.shape[1] != dim:
        raise BatchError(
            f"{name} of shape {shape} has width {pooled.shape[1]} after pooling, but "
            f"feature_dim={dim}. Pass the features that the embedder takes, or build the loss with "
            f"feature_dim={pooled.shape[1]}."
        )


def package_of(module: str) -> str:
    """The top-level package of a module's name."""
    return module.partition(".")[0]


def _must_be(name: str, value: object, what: str, when: str = "") -> ArgumentError:
    return ArgumentError(f"{name}={value!r}{when} must be {what}.")
