"""The training step: a Python number, kept in the state_dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

is_compiling = getattr(torch.compiler, "is_compiling", bool)  # from torch 2.2 on


class StepCounter(nn.Module):
    """Counts training forwards.

    torch.compile takes a number that a module holds for a constant, so compiled forwards are
    counted by a tensor on the device. It is read only where somebody asks for the number.
    """

    _compiled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._eager = 0
        self._uses_compiled = False
        self.register_buffer("_compiled", torch.tensor(0), persistent=False)

    def tick(self) -> None:
        if is_compiling():
            self._uses_compiled = True
            self._compiled.add_(1)
        else:
            self._eager += 1

    def has_reached(self, step: int) -> bool | Tensor:
        """Whether that step has begun: a tensor in a compiled forward."""
        return self._compiled + self._eager >= step if is_compiling() else self.count >= step

    @property
    def count(self) -> int:
        return self._eager + (int(self._compiled) if self._uses_compiled else 0)

    @count.setter
    def count(self, count: int) -> None:
        self._eager, self._uses_compiled = int(count), False
        self._compiled.zero_()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.count)  # a tensor: safetensors holds nothing else

    def set_extra_state(self, state: Tensor) -> None:
        self.count = int(state)


def rename_step(state_dict: dict[str, Any], prefix: str) -> None:
    """Before a state_dict is loaded: former ones hold the step in a buffer of that name."""
    if f"{prefix}step" in state_dict:
        state_dict[f"{prefix}counter._extra_state"] = state_dict.pop(f"{prefix}step")
