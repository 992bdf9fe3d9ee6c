"""What an S2SDLoss looks like from outside: its settings, the base loss's attributes, loggers."""

from __future__ import annotations

from collections import UserDict
from typing import Any

from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import nn

from .counter import StepCounter, rename_step
from .validation import check_assignable

# What frameworks look for on a module to initialise or unwrap it: never the base loss's.
NOT_FORWARDED = ("weight", "bias", "reset_parameters", "init_weights", "module")
SETTINGS = (
    "feature_dim head_dims distill_weight temperature feature_distill_weight feature_distill_delay "
    "pooling exclude_self chunk_size gather_distributed"
).split()


class LossWrapper(ModuleWithRecords):  # type: ignore[misc]
    """A module that shows the public attributes of the base loss, ``self.loss``, as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = StepCounter()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # not as a hook of load_state_dict: PML's record keeper walks a module's hooks
        rename_step(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def step(self) -> int:
        """Training forwards so far, saved and restored with the state_dict."""
        return self.counter.count

    @step.setter
    def step(self, step: int) -> None:
        self.counter.count = step

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
