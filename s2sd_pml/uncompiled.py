"""Keep torch.compile out of what it cannot trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """The function, run as it is where torch.compile would trace it.

    Marked at the first call, for ``torch.compiler`` takes a second to import.
    """
    marked: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not marked:
            marked.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return marked[0](*args, **kwargs)

    return call  # type: ignore[return-value]
