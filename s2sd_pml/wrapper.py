"""What an S2SDLoss looks like from outside: its settings, the base loss's attributes, loggers."""

from __future__ import annotations

from collections import UserDict
from typing import Any

from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import nn

from .counter import StepCounter, rename_step
from .errors import ArgumentError

# What frameworks look for on a module to initialise or unwrap it: never the base loss's.
NOT_FORWARDED = ("weight", "bias", "reset_parameters", "init_weights", "module")
FIXED = ("head_dims", "feature_dim", "matryoshka_dims")
ONLY_AT_CONSTRUCTION = ("embedder", "trunk", "head", "embedding_size")
SETTINGS = (
    "feature_dim head_dims distill_weight temperature feature_distill_weight feature_distill_delay "
    "pooling exclude_self chunk_size gather_distributed"
).split()


class LossWrapper(ModuleWithRecords):  # type: ignore[misc]
    """A module that shows the public attributes of the base loss, ``self.loss``, as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = StepCounter()

    @property
    def step(self) -> int:
        """Training forwards so far, saved and restored with the state_dict."""
        return self.counter.count

    @step.setter
    def step(self, step: int) -> None:
        self.counter.count = step

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        rename_step(state_dict, prefix)  # no hook: PML's record keeper would walk it, and fail
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)

    def __setattr__(self, name: str, value: Any) -> None:
        check_assignable(self, name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the base loss, such as its proxies, where there is none here."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            base = self.__dict__.get("_modules", {}).get("loss")
            if base is None or name.startswith("_"):
                raise
            if name in NOT_FORWARDED and hasattr(base, name):
                raise AttributeError(
                    f"S2SDLoss has no {name!r}. Use loss_func.loss.{name}."
                ) from None
            if not hasattr(base, name):
                raise AttributeError(
                    f"S2SDLoss has no {name!r}, and neither has loss_func.loss, the base loss "
                    f"{type(base).__name__}."
                ) from error
            return getattr(base, name)


def check_assignable(loss_func: nn.Module, name: str, value: Any) -> None:
    """An attribute that is not fixed when the loss is built, and is not the base loss's own."""
    held = {**loss_func.__dict__, **loss_func.__dict__.get("_modules", {})}
    if name in ONLY_AT_CONSTRUCTION or (name in FIXED and name in held):
        raise ArgumentError(
            f"{name}={value!r} cannot be assigned: the loss is built for the {name} it was given. "
            f"Build a new one, S2SDLoss(..., {name}=...)."
        )
    if "_guard" not in held or name in held or name.startswith("_"):  # under construction, or ours
        return
    if hasattr(held["loss"], name) and not hasattr(type(loss_func), name):
        raise ArgumentError(
            f"{name}={value!r} would not reach the base losses, which have it. Assign it to "
            f"each: for m in [loss_func, *loss_func.branches.values()]: m.loss.{name} = {value!r}"
        )


class UnrecordedModuleDict(nn.ModuleDict):
    """A ModuleDict whose children PML's record keeper does not walk.

    record_keeper follows every attribute that is a module or a dict, and turns each parameter it
    meets into a Python list at each logged step: the paper's heads are 18 million numbers. A module
    keeps its children in a dict. Here it is a ``UserDict``: torch sees the same mapping, and
    record_keeper sees no dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._modules = UserDict()  # type: ignore[assignment]
