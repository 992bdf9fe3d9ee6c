"""PML's losses and miners by class name, with keyword arguments."""

from __future__ import annotations

import argparse
import difflib
import inspect
from types import ModuleType
from typing import Any

from pytorch_metric_learning import losses, miners
from torch import nn

LossAndMiner = tuple[nn.Module, "nn.Module | None"]


def pml_loss(args: argparse.Namespace, num_classes: int) -> LossAndMiner:
    """The plain PML loss of the flags, and the miner that goes with it."""
    loss_func = make_loss(args.loss, args.loss_args, num_classes, args.embedding_size)
    return loss_func, make_miner(args.miner, args.miner_args)


def make_loss(name: str, given: dict[str, Any], num_classes: int, embedding_size: int) -> nn.Module:
    """A loss; the sizes that its constructor demands are filled in, and those given as "auto"."""
    sizes = {
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        "descriptors_dim": embedding_size,  # P2SGradLoss
        "l": embedding_size,  # ManifoldLoss
    }
    return _make(losses, name, given, sizes)


def make_miner(name: str, given: dict[str, Any]) -> nn.Module | None:
    """A miner, or None for "none"."""
    return None if name.lower() == "none" else _make(miners, name, given, {})


def _make(module: ModuleType, name: str, given: dict[str, Any], known: dict[str, Any]) -> nn.Module:
    kind = module.__name__.rpartition(".")[2]
    classes = {n: c for n, c in vars(module).items() if inspect.isclass(c)}
    if name not in classes:
        close = difflib.get_close_matches(name, classes, n=3, cutoff=0.4)
        raise ValueError(
            f"pytorch_metric_learning.{kind} has no {name!r}"
            + (f"; did you mean {', '.join(close)}?" if close else "")
        )
    parameters = _parameters(classes[name])
    signature = f"{name}({', '.join(map(str, parameters.values()))})"
    unknown = [key for key in given if key not in parameters]
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and key not in {**known, **given}
    ]
    if unknown or missing:
        complaint = f"does not take {unknown[0]}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(f"{name} {complaint}: {signature}")
    filled = {k: known[k] for k, p in parameters.items() if k in known and p.default is p.empty}
    given = {k: known[k] if v == "auto" and k in known else v for k, v in given.items()}
    try:
        instance: nn.Module = classes[name](**{**filled, **given})
    except Exception as error:
        raise ValueError(f"{signature} refuses {given}: {error or type(error).__name__}") from error
    return instance


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters; a class with ``*args`` passes them on to its parent."""
    found: dict[str, inspect.Parameter] = {}
    for ancestor in inspect.getmro(cls):
        if "__init__" not in vars(ancestor):
            continue
        _, *own = inspect.signature(ancestor.__init__).parameters.values()
        kinds = {p.kind for p in own}
        for p in own:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, p)
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            break
    return found
