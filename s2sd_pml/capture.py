"""Find the features that made a batch of embeddings, by the autograd graph.

A hook notes the features on the autograd node of what its module returned. The note lives and dies
with the graph, so nothing can go stale and nothing is kept alive. At loss time the graph is walked
back from the embeddings to the note.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .counter import is_compiling
from .errors import ArgumentError, MissingFeaturesError
from .rows import UnfollowableError, follow_rows
from .uncompiled import uncompiled

Side = Literal["input", "output"]
KEY = "s2sd_pml "  # of our hooks among those of a module
MAX_NODES = 4000  # a walk that long has left the embedder


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

    Examples:
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
        self._before = threading.local()  # versions of the inputs of the forward under way
        try:
            handles = [module.register_forward_hook(_Hook(self), with_kwargs=True)]
            if side == "input":
                handles.append(module.register_forward_pre_hook(_PreHook(self), with_kwargs=True))
        except RuntimeError as error:  # a scripted module
            raise ArgumentError(
                f"{type(module).__name__} takes no forward hooks ({error}). "
                "Pass features=... to the loss instead."
            ) from None
        for handle in handles:
            _rename(handle, module)
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._finalizer.atexit = False

    @property
    def module(self) -> nn.Module | None:
        """The module, while it lives."""
        return self._module()

    def features_of(self, embeddings: Tensor, name: str = "features") -> Tensor:
        """The features that made these embeddings, row for row, still attached to the graph.

        The embeddings may be what the module returned, or made from it: normalised, cast, sliced,
        indexed, or the concatenation of several forwards. An error asks for ``name`` instead.

        Raises:
            MissingFeaturesError: if no capture leads to the embeddings, if several that differ do,
                if rows were reordered in a way that cannot be followed, or if the features were
                changed in place since.
        """
        mend = f"Pass {name}=... to the loss."
        if embeddings.grad_fn is None:
            whose, hint = "The embeddings", "For evaluation call loss_func.eval() first. "
            if name == "ref_features":
                whose, hint = "The reference embeddings, ref_emb,", ""
            raise MissingFeaturesError(
                f"{whose} of shape {tuple(embeddings.shape)} carry no autograd graph "
                "(no_grad, detach() or a frozen model), so their features cannot be looked up. "
                f"{hint}{mend}"
            )
        try:
            features = follow_rows(embeddings, self._noted, MAX_NODES)
        except UnfollowableError as error:
            raise MissingFeaturesError(f"{error} {mend}") from None
        if features is None and self.module is None:
            raise MissingFeaturesError(
                "The module whose features were to be captured is deleted. If it was replaced by "
                "another, put that into the optimizer and assign loss_func.capture = "
                f"FeatureCapture(<that one>, {self.side!r}). {mend}"
            )
        if features is None:
            raise MissingFeaturesError(
                f"No captured forward of {self._describe()} leads to these embeddings of shape "
                f"{tuple(embeddings.shape)}, grad_fn {embeddings.grad_fn.name()}. They come from "
                "another model or a copy of it, from a frozen trunk (name the embedder instead), "
                "from a forward under no_grad or before the loss was built (a compiled model keeps "
                f"its old graph), or from a module inside a replica. {mend}"
            )
        return features

    def remove(self) -> None:
        """Take the hook off the module."""
        self._finalizer()

    @staticmethod
    def remove_from(model: nn.Module) -> nn.Module:
        """Take every such hook off a model, or off a copy of one, and return it.

        The hooks of a copy (an EMA model) do nothing, but ``torch.jit.script`` knows no hooks, and
        ``torch.export`` and ``fullgraph=True`` none that break the graph. A loss that was built on
        the model has lost its capture then, as after ``remove``.
        """
        for module in model.modules():
            for hooks in _hooks(module):
                for key in [k for k in hooks if str(k).startswith(KEY)]:
                    del hooks[key]
        return model

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
        name = type(self.module).__name__
        return f"the {'embedder' if self.side == 'input' else 'trunk'} {name}"

    def _noted(self, node: Any) -> Tensor | None:
        note = node.metadata.get(self._key)
        if note is None:
            return None
        features, version = note
        if isinstance(features, str):
            raise UnfollowableError(features)
        if features._version != version:
            raise UnfollowableError(
                f"The features captured at {self._describe()} were changed in place after they "
                "were used: make that operation out-of-place. Or do without what was captured:"
            )
        return features  # type: ignore[no-any-return]

    def _remember_versions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward: what the inputs' versions are, to see a change in place."""
        inputs = _features_among([*args, *kwargs.values()])
        self._before.versions = {id(t): t._version for t in inputs if not t.is_inference()}

    @uncompiled  # so that it breaks the graph just once
    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note the features on the nodes of the outputs; return a replacement output or None.

        Where the features are unclear, note why: it matters only if a loss asks for them.
        """
        outputs = [t for t in _tensors(output) if t.grad_fn is not None]
        if not outputs:
            return None
        features = self._find(args, kwargs, output)
        version = features._version if isinstance(features, Tensor) else 0
        # A note on the features' own node would keep itself alive; a fresh node will not.
        replacement = None
        own = features.grad_fn if isinstance(features, Tensor) else None
        if own is not None and any(t.grad_fn is own for t in outputs):
            if isinstance(output, Tensor):
                replacement = output.clone()
                outputs = [replacement]
            else:
                features = f"{self._describe()} returns its input inside {type(output).__name__}."
        for t in outputs:
            node: Any = t.grad_fn
            node.metadata[self._key] = (features, version)
        return replacement

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | str:
        """The features of a forward, or why they are unclear."""
        if self.side == "output":
            if isinstance(output, Tensor):
                return output
            return (
                f"{self._describe()} returns {type(output).__name__}, so it is unclear which part "
                "is the features. Name the embedder instead: embedder=<module>."
            )
        inputs = _features_among([*args, *kwargs.values()])
        if len(inputs) != 1:
            shapes = [tuple(t.shape) for t in inputs]
            return (
                f"{self._describe()} was called with {len(inputs)} floating point tensors of two "
                f"or more dimensions, of shapes {shapes}; it is unclear which is the features."
            )
        before = self._before.__dict__.pop("versions", {})  # none in a compiled forward
        if before.get(id(inputs[0]), inputs[0]._version) != inputs[0]._version:
            return (
                f"{self._describe()} changes its input in place (a ReLU with inplace=True?), so "
                "the features are gone. Make its first operation out-of-place."
            )
        return inputs[0]


class _Watch:
    """A hook that keeps neither the capture nor the module alive; its copies are idle."""

    def __init__(self, capture: FeatureCapture | None = None) -> None:
        self._capture = None if capture is None else weakref.ref(capture)

    def capture_of(self, module: nn.Module) -> FeatureCapture | None:
        """The capture, if it lives and watches this very module and a graph is built."""
        capture = None if self._capture is None else self._capture()
        watches = capture is not None and capture.module is module and torch.is_grad_enabled()
        return capture if watches else None

    def __deepcopy__(self, _: dict[int, Any]) -> _Watch:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a pickled model it is a call without effect: loading it needs nothing of ours."""
        return getattr, (contextlib.nullcontext(), "__exit__")


class _PreHook(_Watch):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_compiling():  # one graph break, at the other hook, is enough
            return
        capture = self.capture_of(module)
        if capture is not None:
            capture._remember_versions(args, kwargs)


class _Hook(_Watch):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        capture = self.capture_of(module)
        return None if capture is None else capture._note(args, kwargs, output)


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    names = ("_forward_hooks", "_forward_pre_hooks")
    return [module.__dict__[n + kind] for n in names for kind in ("", "_with_kwargs")]


def _rename(handle: Any, module: nn.Module) -> None:
    """Give a hook a key that no other takes.

    torch numbers hooks from 0 in every process: in a pickled model another would take ours over.
    """
    old, handle.id = handle.id, f"{KEY}{handle.id}"
    for hooks in _hooks(module):
        if old in hooks:
            hooks[handle.id] = hooks.pop(old)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _nothing() -> None:
    return None


def _features_among(values: list[Any]) -> list[Tensor]:
    """The different tensors that may be features: floating point, two or more dimensions."""
    found = {id(t): t for t in _tensors(values) if t.is_floating_point() and t.ndim > 1}
    return list(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a (shallow) structure of lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (v for v in value.values() if isinstance(v, Tensor))
    elif isinstance(value, (list, tuple)):
        yield from (v for v in value if isinstance(v, Tensor))
