"""Find the features that made a batch of embeddings, by the autograd graph.

A hook notes the features on the autograd node of what its module returned. The note lives and dies
with the graph, so nothing can go stale and nothing is kept alive. At loss time the graph is walked
back from the embeddings to the note.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from .errors import ArgumentError, MissingFeaturesError
from .rows import UnfollowableError, follow_rows

Side = Literal["input", "output"]
MAX_NODES = 400  # a walk that long has left the embedder


class FeatureCapture:
    """Note the features of every training forward, without touching the model's code.

    Args:
        module: with ``side="input"`` the embedder, whose input is the features; with
            ``side="output"`` the trunk, whose output is the features. Hook the module that is
            called, such as a DataParallel wrapper, not a module inside it. It is held by weak
            reference only.
        side: "input" or "output".

    Only forwards that build a graph are noted: nothing is kept of evaluation under ``no_grad``.
    A deep copy of the module (an EMA model) is not captured. With ``side="output"`` the module
    returns a copy of its output in training forwards, so that a later in-place operation does not
    reach the features.

    Example:
        >>> import torch
        >>> trunk, embedder = nn.Linear(8, 6), nn.Linear(6, 2)
        >>> with FeatureCapture(embedder) as capture:
        ...     features = trunk(torch.randn(4, 8))
        ...     embeddings = nn.functional.normalize(embedder(features))
        ...     capture.features_of(embeddings) is features
        True
    """

    def __init__(self, module: nn.Module, side: Side = "input") -> None:
        if not isinstance(module, nn.Module):
            raise ArgumentError(
                f"FeatureCapture needs the nn.Module whose {side} is the features, "
                f"not {type(module).__name__}."
            )
        if side not in ("input", "output"):
            raise ArgumentError(f"side={side!r} is unknown. Use 'input' or 'output'.")
        self.side: Side = side
        self._module = weakref.ref(module)
        self._key = object()  # of this capture's notes, in the nodes' metadata
        handle = module.register_forward_hook(_Hook(self), with_kwargs=True)
        self._finalizer = weakref.finalize(self, handle.remove)
        self._finalizer.atexit = False

    @property
    def module(self) -> nn.Module | None:
        """The module, while it lives."""
        return self._module()

    def features_of(self, embeddings: Tensor) -> Tensor:
        """The features that made these embeddings, row for row, still attached to the graph.

        The embeddings may be what the module returned, or made from it: normalised, cast, sliced,
        indexed, or the concatenation of several forwards.

        Raises:
            MissingFeaturesError: if no capture leads to the embeddings, if several that differ do,
                if rows were reordered in a way that cannot be followed, or if the features were
                changed in place since.
        """
        mend = "Pass features=... to the loss."
        if embeddings.grad_fn is None:
            raise MissingFeaturesError(
                f"The embeddings of shape {tuple(embeddings.shape)} carry no autograd graph "
                "(no_grad, detach() or a frozen model), so their features cannot be looked up. "
                f"For evaluation call loss_func.eval() first. {mend}"
            )
        try:
            features = follow_rows(embeddings, self._noted, MAX_NODES)
        except UnfollowableError as error:
            raise MissingFeaturesError(f"{error} {mend}") from None
        if features is None:
            raise MissingFeaturesError(
                f"No captured forward of {self._describe()} leads to these embeddings of shape "
                f"{tuple(embeddings.shape)}, grad_fn {embeddings.grad_fn.name()}. They come from "
                "another model or copy of it, from before the loss was built, from a forward under "
                f"no_grad, or from a module inside a replica. {mend}"
            )
        return features

    def remove(self) -> None:
        """Take the hook off the module."""
        self._finalizer()

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCapture | None:
        """Watch the module's copy where it was copied along, else the same module."""
        module = self.module
        return None if module is None else FeatureCapture(memo.get(id(module), module), self.side)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # the model is no part of a pickled loss

    def _describe(self) -> str:
        module = self.module
        name = "a deleted module" if module is None else type(module).__name__
        return f"the {'embedder' if self.side == 'input' else 'trunk'} {name}"

    def _noted(self, node: Any) -> Tensor | None:
        note = node.metadata.get(self._key)
        if note is None:
            return None
        features, version = note
        if features._version != version:
            raise MissingFeaturesError(
                f"The features captured at {self._describe()} were changed in place after they "
                "were used. Make that operation out-of-place, or pass features=... to the loss."
            )
        return features  # type: ignore[no-any-return]

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note the features on the nodes of the outputs; return a replacement output or None."""
        outputs = [t for t in _tensors(output) if t.grad_fn is not None]
        if not outputs:
            return None
        if self.side == "output":
            if not isinstance(output, Tensor):
                raise MissingFeaturesError(
                    f"{self._describe()} returns {type(output).__name__}, so it is unclear which "
                    "part is the features. Pass embedder=<module> or features=... instead."
                )
            features = output
        else:
            inputs = next(_tensors([*args, *kwargs.values()]), None)
            if inputs is None:
                raise MissingFeaturesError(
                    f"{self._describe()} was called without a tensor. Pass features=... instead."
                )
            features = inputs
        # A note on the features' own node would keep itself alive; a fresh node will not.
        replacement = None
        if any(t.grad_fn is features.grad_fn for t in outputs):
            if not isinstance(output, Tensor):
                raise MissingFeaturesError(
                    f"{self._describe()} returns its own input within {type(output).__name__}. "
                    "Pass features=... to the loss instead."
                )
            replacement = output.clone()
            outputs = [replacement]
        for t in outputs:
            node: Any = t.grad_fn
            node.metadata[self._key] = (features, features._version)
        return replacement


class _Hook:
    """The forward hook. It keeps neither the capture nor the module alive; its copies are idle."""

    def __init__(self, capture: FeatureCapture | None = None) -> None:
        self._capture = None if capture is None else weakref.ref(capture)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        capture = None if self._capture is None else self._capture()
        if capture is None or capture.module is not module:
            return None
        return capture._note(args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _nothing() -> None:
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a (shallow) structure of lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (v for v in value.values() if isinstance(v, Tensor))
    elif isinstance(value, (list, tuple)):
        yield from (v for v in value if isinstance(v, Tensor))
