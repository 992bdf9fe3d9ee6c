"""All errors are an ``S2SDError``; their messages report the offending value and suggest a fix."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__)


class S2SDError(ValueError):
    """Base class of all errors that ``s2sd_pml`` raises."""


class ArgumentError(S2SDError):
    """An argument or a setting has the wrong type, is out of range, or contradicts another."""


class UnsupportedLossError(S2SDError):
    """The base loss cannot be used: it returns no scalar, or cannot be copied for another size."""


class BatchError(S2SDError):
    """Embeddings, labels, features or an indices_tuple have the wrong type or shape."""


class MissingFeaturesError(S2SDError):
    """The features of these embeddings were not found, or cannot be trained through."""


class DistributedError(S2SDError):
    """The ranks of a process group cannot share this batch."""


class S2SDWarning(UserWarning):
    """Base class of all warnings, and the class of those of other things than the heads."""


class OptimizerWarning(S2SDWarning):
    """The auxiliary heads are not trained, or badly: in no optimizer, or as the warning says."""


def outside() -> int:
    """The stack level, for the caller, of the first frame that is neither ours nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    return level
