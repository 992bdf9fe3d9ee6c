"""Numbers within their range, refused with the value seen. NumPy's numbers are numbers too."""

from __future__ import annotations

import math
from numbers import Integral, Real

from .errors import ArgumentError


def whole(name: str, value: object, at_least: int, otherwise: str = "") -> None:
    """Refuse what is not a whole number in range."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise ArgumentError(
            f"{name}={value!r} must be a whole number of at least {at_least}{otherwise}."
        )


def positive(name: str, value: object) -> None:
    """Refuse what is not a finite number above 0."""
    if not is_number(value) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ArgumentError(f"{name}={value!r} must be a finite number above 0.")


def is_weight(value: object) -> bool:
    """Whether it is a finite number of at least 0."""
    return is_number(value) and 0 <= float(value) < math.inf  # type: ignore[arg-type]


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
