"""Optimizer groups of the heads and of the losses' own parameters."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn, optim

from .errors import ArgumentError
from .validation import check_weight


def split(
    loss: nn.Module, heads: list[nn.Parameter], lr: float, weight_decay: float, loss_lr: float
) -> list[dict[str, Any]]:
    """One group for the heads, one for every other parameter of the loss; empty ones left out."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("loss_lr", loss_lr)):
        if value is None and name != "weight_decay":  # an optimizer that chooses its own
            continue
        check_weight(name, value)
    ids = _ids(heads)
    others = [p for p in loss.parameters() if id(p) not in ids]
    both = [
        {"params": heads, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": loss_lr, "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


def check(optimizer: optim.Optimizer, options: dict[str, Any]) -> None:
    """Refuse what is no optimizer or has a scheduler, and options that it would not heed."""
    if not isinstance(optimizer, optim.Optimizer):
        raise ArgumentError(f"add_to needs a torch optimizer, not {type(optimizer).__name__}.")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ArgumentError(
            f"A scheduler was built already for this {type(optimizer).__name__} with "
            f"{len(optimizer.param_groups)} groups and would not know new ones. "
            "Call loss_func.add_to(optimizer) before you build the scheduler, and before you load "
            "a state that had one."
        )
    known = {"name", *_defaults(optimizer), *(k for g in optimizer.param_groups for k in g)}
    known -= {"params", "lr", "weight_decay"}
    if unknown := sorted(set(options) - known):
        raise ArgumentError(
            f"{type(optimizer).__name__} has no option {', '.join(unknown)}. There are lr, "
            f"weight_decay and loss_lr, and of its own {', '.join(sorted(known))}. With "
            "others, for a scheduler say, add the groups of loss_func.param_groups(...) yourself."
        )


def rate(optimizer: optim.Optimizer, loss: nn.Module) -> Any:
    """The learning rate that the model's groups have, or else the optimizer's own if one has it.

    Groups of the loss's own parameters, such as its proxies, do not count. Without any that is
    known, or with nothing left to add, it is the optimizer's own, or None.
    """
    ours = _ids(loss.parameters())
    own = _known(_defaults(optimizer).get("lr"))
    rates = {
        float(g["lr"]): g["lr"]
        for g in optimizer.param_groups
        if _ids(g["params"]) - ours and _known(g.get("lr")) is not None
    }
    if not rates or ours <= _held(optimizer) or (own is not None and float(own) in rates):
        return own
    if len(rates) > 1:
        raise ArgumentError(
            f"The groups of this {type(optimizer).__name__} have learning rates {sorted(rates)}, "
            f"and none of them its own lr={own}. Say which one the heads get: add_to(..., lr=...)."
        )
    return next(iter(rates.values()))


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}


def _held(optimizer: optim.Optimizer) -> set[int]:
    return _ids(p for group in optimizer.param_groups for p in group["params"])


def _defaults(optimizer: optim.Optimizer) -> dict[str, Any]:
    return getattr(optimizer, "defaults", {})  # wrappers around an optimizer may have none


def _known(lr: Any) -> Any:
    """None for what is no number: some optimizers choose their own, old ones mark what is due."""
    return lr if isinstance(lr, (Real, Tensor)) else None


def rate_of(optimizer: optim.Optimizer, loss: nn.Module) -> Any:
    """The learning rate of a group that holds parameters of the loss; None if there is none."""
    own = _ids(loss.parameters())
    return next((g.get("lr") for g in optimizer.param_groups if own & _ids(g["params"])), None)


def add(
    optimizer: optim.Optimizer, new_groups: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Add groups to an optimizer, without the parameters that it holds already."""
    held = _held(optimizer)
    for group in new_groups:
        params = [p for p in group["params"] if id(p) not in held]
        if params:
            optimizer.add_param_group({**group, **options, "params": params})
