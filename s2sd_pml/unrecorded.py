"""Keep the heads out of loggers that walk a loss."""

from __future__ import annotations

from collections import UserDict

from torch import nn


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
