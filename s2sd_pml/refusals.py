"""What becomes of an error that a base loss or its miner raises, and what a loss may return."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from numbers import Real
from traceback import walk_tb
from typing import Any

import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn

from .cloning import embedding_size_of
from .errors import BatchError, UnsupportedLossError
from .validation import PML, package_of

# What losses and miners raise for a batch that they do not take.
REFUSALS = (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)


def refused(
    error: Exception,
    loss: Any,
    miner: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    given: Iterable[str],
) -> BatchError | None:
    """The BatchError to raise for an error of a loss or its miner, or None to re-raise it as it is.

    What PML's code refuses becomes a BatchError. Errors of custom code stay, with a note of where
    they came from (from Python 3.11). Errors of the machine, such as a lack of memory, stay too.
    """
    size, message = embedding_size_of(loss), str(error)
    odd_size = size not in (None, embeddings.shape[1])
    odd_labels = labels is not None and labels.dtype != torch.long
    runtime_error = type(error) is RuntimeError
    sized = runtime_error and re.search("size|shape|dimension|broadcast", message)
    buffers = ", ".join(_buffers(loss)) if sized else ""

    names = type(loss).__name__ + ("" if miner is None else f" with {type(miner).__name__}")
    seen = "no labels" if labels is None else f"labels {tuple(labels.shape)} {labels.dtype}"
    called = f"embeddings {tuple(embeddings.shape)}, {', '.join([seen, *given])}"
    fix = "Call it as without S2SDLoss: pass only what this loss accepts."
    if odd_size:
        fix = f"The loss is made for embeddings of size {size}. {fix}"
    if odd_labels:
        fix = f"Try labels.long(). {fix}"
    if buffers:  # S2SDLoss copied them for spaces of other sizes
        fix = (
            f"If its buffers ({buffers}) are made for one embedding size, pass S2SDLoss a factory "
            f"dim -> loss. {fix}"
        )
    elif _in_custom_code(error):
        if sys.version_info >= (3, 11):
            error.add_note(f"Raised in {names}, which S2SDLoss called with {called}. {fix}")
        return None
    elif not isinstance(error, REFUSALS):
        odd = odd_size or odd_labels or "Class values" in message  # PML's, for labels
        if not (runtime_error and odd):
            return None
    cause = f"{type(error).__name__}: {message or 'an assertion failed'}"
    return BatchError(f"{names} refused {called}. {cause}. {fix}")


def check_loss_value(value: Any, loss: nn.Module) -> None:
    """A base loss returned a scalar: a tensor of one element, or a number."""
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return
    seen, fix = type(value).__name__, "return the loss alone, as a scalar tensor"
    if isinstance(value, Tensor):
        seen, fix = f"tensor of shape {tuple(value.shape)}", "return a scalar, such as its .mean()"
    elif isinstance(value, dict) and isinstance(loss, losses.BaseMetricLossFunction):
        fix = "have a reducer that returns a scalar, such as MeanReducer()"
    elif isinstance(value, (dict, tuple, list)):
        fix += "; keep anything else as an attribute, such as self.accuracy"
    raise UnsupportedLossError(f"{type(loss).__name__} returned a {seen}. A base loss must {fix}.")


def _buffers(loss: Any) -> list[str]:
    """Names of the buffers of a custom loss that may be of the embedding size."""
    if not isinstance(loss, nn.Module) or package_of(type(loss).__module__) == PML:
        return []
    return [n for n, b in loss.named_buffers() if b.ndim and b.is_floating_point()]


def _in_custom_code(error: Exception) -> bool:
    """Whether the error passed through code outside PML, PyTorch and this package."""
    known = {PML, "torch", package_of(__name__), *sys.stdlib_module_names}
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(package_of(frame.f_globals.get("__name__") or "") not in known for frame in frames)
