"""Independent copies of PML losses for another embedding size.

Most PML losses hold nothing that depends on the embedding size; a deep copy serves them. The rest
are listed in ``EMBEDDING_AXES``. The axis is looked up, never guessed: proxies may be square.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn

from .errors import ArgumentError, UnsupportedLossError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class EmbeddingAxis:
    """Where a loss keeps its embedding-sized parameter, and how it is initialised again."""

    parameter: str
    axis: int
    initialise: Callable[[nn.Module, Tensor], object]
    size_attribute: str | None = None


def _weight_init_func(loss: Any, weight: Tensor) -> None:
    loss.weight_init_func(weight)


def _p2s_grad(_: nn.Module, weight: Tensor) -> None:
    weight.uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)


def _standard_normal(_: nn.Module, weight: Tensor) -> None:
    weight.normal_()


# A subclass inherits the entry of its nearest listed ancestor: ArcFace, CosFace, SphereFace and
# SubCenterArcFace are LargeMarginSoftmax losses.
EMBEDDING_AXES: dict[type[nn.Module], EmbeddingAxis] = {
    losses.LargeMarginSoftmaxLoss: EmbeddingAxis("W", 0, _weight_init_func),
    losses.NormalizedSoftmaxLoss: EmbeddingAxis("W", 0, _weight_init_func),
    losses.SoftTripleLoss: EmbeddingAxis("fc", 0, _weight_init_func),
    losses.ProxyAnchorLoss: EmbeddingAxis("proxies", 1, _weight_init_func),
    losses.ProxyNCALoss: EmbeddingAxis("proxies", 1, _weight_init_func),
    losses.P2SGradLoss: EmbeddingAxis("weight", 0, _p2s_grad, "descriptors_dim"),
    losses.ManifoldLoss: EmbeddingAxis("proxies", 1, _standard_normal, "l"),
}

# Parameters that do not depend on the embedding size.
SIZE_FREE_PARAMETERS: dict[type[nn.Module], frozenset[str]] = {
    losses.MarginLoss: frozenset({"beta"}),
}


def clone_loss(loss: nn.Module, embedding_size: int) -> nn.Module:
    """An independent, freshly initialised copy of a PML loss for another embedding size.

    Embedding-sized parameters are drawn anew with the loss's own initialiser, at the same size
    too. ``CrossBatchMemory`` (with an empty queue), ``MultipleLosses`` and ``SelfSupervisedLoss``
    are copied with the losses inside them. A learnable ``beta`` of MarginLoss starts from its
    present value.

    Args:
        loss: a loss from ``pytorch_metric_learning.losses``, a subclass of one, or any module
            without parameters.
        embedding_size: the dimension that the copy is for.

    Returns:
        A new module; the loss is left as it is.

    Raises:
        UnsupportedLossError: if the loss has parameters that are not known here. Pass ``S2SDLoss``
            a factory ``dim -> loss`` instead of a loss, then.

    Examples:
        >>> loss = losses.ProxyAnchorLoss(num_classes=10, embedding_size=64)
        >>> clone_loss(loss, 512).proxies.shape
        torch.Size([10, 512])
    """
    try:
        clone = copy.deepcopy(loss)
    except Exception as error:
        raise UnsupportedLossError(
            f"{type(loss).__name__} cannot be copied ({error}). Pass S2SDLoss a factory "
            f"`dim -> loss` instead. If the loss was used already, copy it before its first call."
        ) from error
    _resize(clone, embedding_size)
    return clone


def _resize(loss: nn.Module, embedding_size: int) -> None:
    """Fit a copied loss, and any losses inside it, to ``embedding_size``, in place."""
    if isinstance(loss, losses.CrossBatchMemory):
        loss.embedding_size = embedding_size
        loss.reset_queue()
    inner: list[nn.Module] = []
    if isinstance(loss, losses.MultipleLosses):
        inner = list(loss.losses.children())
    elif isinstance(loss, losses.BaseLossWrapper):
        inner = [loss.loss]
    for module in inner:
        _resize(module, embedding_size)
    _redraw(loss, embedding_size, inner)
    _reset_miners(loss)


def _redraw(loss: nn.Module, embedding_size: int, inner: list[nn.Module]) -> None:
    """Draw the loss's embedding-sized parameter anew; refuse parameters that are not known."""
    spec = _nearest(EMBEDDING_AXES, loss)
    known = set(_nearest(SIZE_FREE_PARAMETERS, loss) or ())
    known |= {spec.parameter} if spec else set()
    done = {id(p) for module in inner for p in module.parameters()}
    for name, parameter in loss.named_parameters():
        if id(parameter) not in done and name not in known:
            raise UnsupportedLossError(
                f"{type(loss).__name__} has a parameter {name!r} of shape "
                f"{tuple(parameter.shape)} and nothing says how it depends on the embedding size. "
                "Pass S2SDLoss a factory `dim -> loss` instead, that makes it and all its parts "
                "for that size."
            )
    if spec is None:
        return
    old: nn.Parameter = getattr(loss, spec.parameter)
    shape = list(old.shape)
    shape[spec.axis] = embedding_size
    with torch.no_grad():
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        spec.initialise(loss, new)
    setattr(loss, spec.parameter, nn.Parameter(new, requires_grad=old.requires_grad))
    if spec.size_attribute is not None:
        setattr(loss, spec.size_attribute, embedding_size)


def embedding_size_of(loss: nn.Module) -> int | None:
    """The size that a loss's own parameter is made for; None if it has none that depends on it."""
    spec = _nearest(EMBEDDING_AXES, loss)
    parameter = None if spec is None else getattr(loss, spec.parameter, None)
    return None if spec is None or parameter is None else int(parameter.shape[spec.axis])


def make_base_loss(loss: Any, embedding_size: int | None) -> nn.Module:
    """The base loss itself, or what a factory makes for the size of the base embedding."""
    if isinstance(loss, nn.Module):
        return loss
    if embedding_size is None:
        raise ArgumentError(
            "The loss is a factory and the size of the base embedding is unknown. Pass "
            "embedding_size=..., or embedder=<a module that ends in nn.Linear>."
        )
    return made_by(loss, embedding_size)


def made_by(factory: Callable[[int], Any], dim: int) -> nn.Module:
    """The factory's loss for a dimension."""
    try:
        loss = factory(dim)
    except TypeError as error:
        raise UnsupportedLossError(
            f"The loss factory failed for dimension {dim} ({error}). It is called as factory(dim) "
            "and returns a loss; a plain function of embeddings and labels must be an nn.Module."
        ) from error
    if not isinstance(loss, nn.Module):
        raise UnsupportedLossError(
            f"The loss factory returned {type(loss).__name__} for dimension {dim}. "
            "It must return an nn.Module: lambda dim: Loss(..., embedding_size=dim)."
        )
    return loss


def check_independent(kind: str, made: list[nn.Module]) -> None:
    """A factory made a new module at every call: spaces share nothing."""
    if len({id(m) for m in made}) < len(made):
        raise UnsupportedLossError(
            f"The {kind} factory returned the same {type(made[0]).__name__} for two dimensions. "
            "It must make a new one at every call."
        )


def clone_miner(miner: nn.Module) -> nn.Module:
    """An independent copy of a PML miner, without the state of what was mined before."""
    clone = copy.deepcopy(miner)
    _reset_miners(clone)
    return clone


def _reset_miners(module: nn.Module) -> None:
    child: Any
    for child in module.modules():
        if hasattr(child, "reset_idx"):  # HDCMiner keeps the indices of its last call
            child.reset_idx()


def _nearest(registry: dict[type[nn.Module], Entry], loss: nn.Module) -> Entry | None:
    return next((registry[c] for c in type(loss).__mro__ if c in registry), None)
