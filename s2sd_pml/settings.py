"""What can be wrong when an S2SDLoss is built, refused with the values seen and the mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from pytorch_metric_learning import losses
from pytorch_metric_learning.reducers import DoNothingReducer
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch import Tensor, nn

from .errors import (
    ArgumentError,
    CloneError,
    UnsupportedLossError,
)
from .heads import check_pooling
from .ranges import is_weight, positive, whole

NO_PAIRS = (
    "InstanceLoss ManifoldLoss P2SGradLoss PNPLoss RankedListLoss SelfSupervisedLoss VICRegLoss"
).split()


def head_dims(dims: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers above 0, all different."""
    given = tuple(dims) if isinstance(dims, Iterable) and not isinstance(dims, str) else None
    if given is None or not all(
        isinstance(d, Integral) and not isinstance(d, bool) and d > 0 for d in given
    ):
        raise ArgumentError(
            f"head_dims={dims!r} must be a sequence of whole numbers above 0, such as (512, 1024)."
        )
    if len(set(given)) < len(given):
        raise ArgumentError(
            f"head_dims={given} repeats a dimension; heads are known by their dimension. "
            "Use neighbouring ones, such as (512, 513)."
        )
    return tuple(int(d) for d in given)


def value_of(name: str, schedule: Any, step: int) -> float:
    """A weight at a training step, finite and at least 0."""
    value = schedule(step) if callable(schedule) else schedule
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not is_weight(value):
        at = f" at step {step}" if callable(schedule) else ""
        raise ArgumentError(
            f"{name}={value!r}{at} must be a finite number of at least 0, or a function of the "
            "training step that returns one."
        )
    return float(value)


def scalars(loss: Any) -> None:
    """The scalar settings of an S2SDLoss."""
    for name in ("distill_weight", "feature_distill_weight"):
        if not callable(getattr(loss, name)):
            value_of(name, getattr(loss, name), 0)
    positive("temperature", loss.temperature)
    whole("feature_distill_delay", loss.feature_distill_delay, at_least=0)
    if loss.chunk_size is not None:
        whole("chunk_size", loss.chunk_size, at_least=1, otherwise=" or None")
    for name in ("exclude_self", "gather_distributed"):
        if not isinstance(getattr(loss, name), bool):
            raise ArgumentError(f"{name}={getattr(loss, name)!r} must be True or False.")
    check_pooling(loss.pooling)


def modules(loss: Any, miner: Any, embedder: Any, trunk: Any, head: Any) -> None:
    """The types of the parts, and combinations that exclude each other."""
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
            "S2SDLoss(..., gather_distributed=True): every branch then mines the global batch."
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


def feature_dim(
    given: Any, embedder: Any, trunk: Any, *, plain_pooling: bool, needed: bool
) -> int | None:
    """F, as given or as the embedder's first layer tells it."""
    first = None if embedder is None else _first_with_parameters(embedder)
    inferred = first.in_features if isinstance(first, nn.Linear) else None
    inferred = inferred or None  # a lazy layer does not know yet
    if given is not None:
        whole("feature_dim", given, at_least=1, otherwise=" or None")
        if isinstance(embedder, nn.Linear) and plain_pooling and inferred not in (None, given):
            raise ArgumentError(
                f"feature_dim={given} but the embedder takes {inferred} features. Leave it out."
            )
        return int(given)
    if inferred is None and needed:
        seen = (
            f"the embedder {type(embedder).__name__} does not start with nn.Linear"
            if embedder is not None
            else f"a trunk {type(trunk).__name__} does not tell"
            if trunk is not None
            else "neither embedder nor trunk was given"
        )
        raise ArgumentError(
            f"The feature dimension is unknown: {seen}. Pass embedder=<the nn.Linear that makes "
            "the embeddings>, or feature_dim=<width of the trunk's pooled output>."
        )
    return inferred


def _first_with_parameters(module: nn.Module) -> nn.Module | None:
    """The first layer, in order of a Sequential, that is more than pooling, dropout or a ReLU."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _first_with_parameters(module.module)
    if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
        return _first_with_parameters(compiled)
    if isinstance(module, nn.Sequential):
        layers = (_first_with_parameters(child) for child in module)
        return next((layer for layer in layers if layer is not None), None)
    return module if next(module.parameters(), None) is not None else None


def base_loss(loss: Any, embedding_size: int | None, embedder: Any) -> nn.Module:
    """The base loss itself, or what a factory makes for the embedding size."""
    if not isinstance(loss, nn.Module):
        if embedding_size is None and embedder is not None:
            linears = [m for m in embedder.modules() if isinstance(m, nn.Linear)]
            embedding_size = linears[-1].out_features if linears else None
        if embedding_size is None:
            raise ArgumentError(
                "The loss is a factory and the size of the base embedding is unknown. Pass "
                "embedding_size=..., or embedder=<a module that ends in nn.Linear>."
            )
        whole("embedding_size", embedding_size, at_least=1)
        loss = made_by(loss, embedding_size)
    supported(loss)
    return loss  # type: ignore[no-any-return]


def made_by(factory: Callable[[int], Any], dim: int) -> nn.Module:
    """The factory's loss for a dimension."""
    try:
        loss = factory(dim)
    except TypeError as error:
        raise CloneError(
            f"The loss factory failed for dimension {dim} ({error}). It is called as factory(dim) "
            "and returns a loss; a plain function of embeddings and labels must be an nn.Module."
        ) from error
    if not isinstance(loss, nn.Module):
        raise CloneError(
            f"The loss factory returned {type(loss).__name__} for dimension {dim}. "
            "It must return an nn.Module: lambda dim: Loss(..., embedding_size=dim)."
        )
    return loss


def independent(kind: str, made: list[nn.Module]) -> None:
    """Refuse a factory that hands out the same module twice: branches share nothing."""
    if len({id(m) for m in made}) < len(made):
        raise CloneError(
            f"The {kind} factory returned the same {type(made[0]).__name__} for two dimensions. "
            "It must make a new one at every call."
        )


def takes_pairs(loss: nn.Module, miner: Any) -> None:
    """Refuse a miner beside a loss that takes no pairs, or mines for itself."""
    if miner is None:
        return
    mines = isinstance(loss, losses.MultipleLosses) and loss.miners is not None
    if mines or type(loss).__name__ in NO_PAIRS:
        why = "has miners of its own" if mines else "takes no pairs or triplets"
        raise ArgumentError(
            f"{type(loss).__name__} {why}, but miner={type(miner).__name__} was given. "
            "Leave the miner out."
        )


def supported(loss: nn.Module) -> None:
    """Refuse base losses that cannot work inside S2SDLoss."""
    for module in loss.modules():
        if "S2SDLoss" in (c.__name__ for c in type(module).__mro__):
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


def head_module(head: Any, in_dim: int, out_dim: int) -> nn.Module:
    """What the head callable made."""
    if not isinstance(head, nn.Module):
        raise ArgumentError(
            f"head({in_dim}, {out_dim}) returned {type(head).__name__}. It must return an "
            f"nn.Module that maps (B, {in_dim}) to (B, {out_dim})."
        )
    return head
