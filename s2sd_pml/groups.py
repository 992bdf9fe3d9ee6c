"""Optimizer groups of the heads and of the losses' own parameters."""

from __future__ import annotations

from typing import Any

from torch import nn, optim

from .errors import OptimizerError


def split(
    loss: nn.Module, heads: list[nn.Parameter], lr: float, weight_decay: float, loss_lr: float
) -> list[dict[str, Any]]:
    """One group for the heads, one for every other parameter of the loss; empty ones left out."""
    ids = {id(p) for p in heads}
    others = [p for p in loss.parameters() if id(p) not in ids]
    both = [
        {"params": heads, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": loss_lr, "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


def add(
    optimizer: optim.Optimizer, new_groups: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Add groups to an optimizer, without the parameters that it holds already."""
    if not isinstance(optimizer, optim.Optimizer):
        raise OptimizerError(f"add_to needs a torch optimizer, not {type(optimizer).__name__}.")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise OptimizerError(
            f"A scheduler was built already for this {type(optimizer).__name__} with "
            f"{len(optimizer.param_groups)} groups and would not know new ones. "
            "Call loss_func.add_to(optimizer) before you build the scheduler, and before you load "
            "a state that had one."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in new_groups:
        params = [p for p in group["params"] if id(p) not in held]
        if params:
            optimizer.add_param_group({**group, **options, "params": params})
