"""Find the features that made a batch of embeddings, by the autograd graph.

A hook notes the features on the autograd node of what its module returned. Backward empties the
note as it frees the graph, so nothing goes stale and nothing is kept alive. At loss time the graph
is walked back from the embeddings to the note.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
import weakref
from collections.abc import MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .counter import is_compiling
from .errors import ArgumentError, MissingFeaturesError, S2SDWarning, outside
from .rows import UnfollowableError, follow_rows, nearest
from .uncompiled import uncompiled

Side = Literal["input", "output"]
KEY = "s2sd_pml "  # of our hooks among those of a module
MAX_NODES = 4000  # a walk that long has left the embedder
# Whether the backward under way has retain_graph=True; older releases of torch do not say.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", bool)


class FeatureCapture:
    """Note the features of every training forward, without touching the model's code.

    Args:
        module: with ``side="input"`` the embedder, whose input is the features; with
            ``side="output"`` the trunk, whose output is the features. Hook the module that is
            called, such as a DataParallel wrapper, not a module inside it. It is held by weak
            reference only. It may take or return a dict, list, tuple or dataclass that holds them.
        side: "input" or "output".

    Only forwards that build a graph are noted: nothing is kept of evaluation under ``no_grad``, nor
    after the backward that frees the graph. A deep copy of the module (an EMA model) is not
    captured. With ``side="output"`` the module returns a copy of its output in training forwards,
    so that a later in-place operation does not reach the features.

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
            raise ArgumentError(f"FeatureCapture needs an nn.Module, not {type(module).__name__}.")
        if side not in ("input", "output"):
            raise ArgumentError(f"side={side!r} is unknown. Use 'input' or 'output'.")
        self.side: Side = side
        self._module = weakref.ref(module)
        self._key = object()  # of this capture's notes, in the nodes' metadata
        self._before = threading.local()  # the inputs of the forward under way
        self._warned = False
        try:
            handles = [
                register(_Hook(self), with_kwargs=True)
                for register in (module.register_forward_pre_hook, module.register_forward_hook)
            ]
        except RuntimeError as error:  # a scripted module
            raise ArgumentError(
                f"{type(module).__name__} takes no forward hooks ({error}). "
                "Pass features=... to the loss instead."
            ) from None
        hooks = contextlib.ExitStack()
        for handle in handles:
            _rename(handle, module)
            hooks.callback(handle.remove)
        self._finalizer = weakref.finalize(self, hooks.close)
        self._finalizer.atexit = False

    @property
    def module(self) -> nn.Module | None:
        """The module, while it lives."""
        return self._module()

    def features_of(self, embeddings: Tensor, name: str = "features") -> Tensor:
        """The features that made these embeddings, row for row, still attached to the graph.

        The embeddings may be what the module returned, or made from it: normalised, cast, sliced,
        indexed, or the concatenation of several forwards.

        Args:
            embeddings: (B, D), with their autograd graph.
            name: the argument that an error message asks for instead.

        Returns:
            The features as the module took or returned them: (B, F) or (B, C, H, W).

        Raises:
            MissingFeaturesError: if no capture leads to the embeddings, or several that differ do,
                or an unknown order of rows; or if the features were changed in place or released.

        Examples:
            >>> import torch
            >>> embedder = nn.Linear(6, 2)
            >>> capture, features = FeatureCapture(embedder), torch.randn(4, 6)
            >>> torch.equal(capture.features_of(embedder(features)[:3]), features[:3])
            True
        """
        fix = f"Pass {name}=... to the loss."
        if embeddings.grad_fn is None:
            whose, hint = "The embeddings", "To evaluate, use loss_func.eval() or torch.no_grad(). "
            if name == "ref_features":
                whose, hint = "The reference embeddings, ref_emb,", ""
            raise MissingFeaturesError(
                f"{whose} of shape {tuple(embeddings.shape)} carry no autograd graph "
                "(no_grad, detach() or a frozen model), so their features cannot be looked up. "
                f"{hint}{fix}"
            )
        widths: list[int] = []  # of the features found on the way
        try:
            features = follow_rows(embeddings, lambda n: self._noted(n, widths), MAX_NODES)
        except UnfollowableError as error:
            if self.side == "output" and widths:
                fix = (
                    "If an aggregation or attention layer behind the trunk does that, name that "
                    f"layer instead of trunk=: embedder=<the layer>, feature_dim={widths[-1]}. "
                    f"Otherwise pass {name}=... to the loss."
                )
            raise MissingFeaturesError(f"{error} {fix}") from None
        if features is None:
            why = (
                f"No captured forward of {self._describe()} leads to these embeddings of shape "
                f"{tuple(embeddings.shape)}, grad_fn {embeddings.grad_fn.name()}. They come from "
                "another model or a copy of it, from a frozen trunk (name the embedder instead), "
                "from a forward under no_grad or before the loss was built (a compiled model keeps "
                "its old graph), or from a module inside a replica."
            )
            if self.module is None:
                why = (
                    "The module whose features were to be captured is deleted. If it was replaced "
                    "by another, put that into the optimizer and assign loss_func.capture = "
                    f"FeatureCapture(<that one>, {self.side!r})."
                )
            raise MissingFeaturesError(f"{why} {fix}")
        self._warn_of_raw_input(features)
        return features

    def remove(self) -> None:
        """Take the hook off the module. What was captured before can still be looked up."""
        self._finalizer()

    @staticmethod
    def remove_from(model: nn.Module) -> nn.Module:
        """Take every such hook off a model, or off a copy of one, and return it.

        The hooks of a copy (an EMA model) do nothing, but ``torch.jit.script`` knows no hooks, and
        ``torch.export`` and ``fullgraph=True`` none that break the graph. A loss that was built on
        the model has lost its capture then, as after ``remove``.

        Args:
            model: a module, with every module inside it.

        Returns:
            The same model.

        Examples:
            >>> model = nn.Sequential(nn.Linear(6, 2))
            >>> capture = FeatureCapture(model[0])
            >>> len(FeatureCapture.remove_from(model)[0]._forward_hooks)
            0
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
        return type(None), ()  # the model is no part of a pickled loss

    def _describe(self) -> str:
        name = type(self.module).__name__
        return f"the {'embedder' if self.side == 'input' else 'trunk'} {name}"

    def _noted(self, node: Any, widths: list[int]) -> Tensor | None:
        note: _Note | None = node.metadata.get(self._key)
        if note is None:
            return None
        features = note.features
        if isinstance(features, str):
            raise UnfollowableError(features)
        if features._version != note.version:
            raise UnfollowableError(
                f"The features captured at {self._describe()} were changed in place after they "
                "were used. Make that operation out-of-place."
            )
        widths.append(features.shape[1 if features.ndim == 4 else -1])
        return features

    def _remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward, which may change tensors in place or replace those in a dict."""
        values = [*args, *kwargs.values()]
        self._before.versions = {id(t): t._version for v in values for t in _tensors(v)}
        self._before.nested = [(v, t) for v in values for t in _tensors(v) if t is not v]

    @uncompiled  # so that it breaks the graph just once
    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note the features on the nodes of the results; return the output, perhaps with copies.

        Where the features are unclear, note why: it matters only if a loss asks for them.
        """
        values = [*args, *kwargs.values()]
        before = self._before.__dict__  # empty in a compiled forward: a dict is not looked into
        versions, nested = before.pop("versions", {}), before.pop("nested", [])
        inputs = [t for v, t in nested if any(v is value for value in values)]
        inputs += [t for v in values for t in _tensors(v) if t is v]
        passed_on = set() if isinstance(output, Tensor) else {id(t) for t in inputs}
        results = [t for t in _tensors(output) if t.grad_fn is not None and id(t) not in passed_on]
        among = {id(t): t for t in (inputs if self.side == "input" else results)}.values()
        candidates = [t for t in among if t.is_floating_point() and t.ndim > 1]
        if self.side == "output" and len(candidates) == 1:
            results = candidates
        for result in results:
            features, target = self._choose(candidates, result, versions), result
            # A note on the features' own node would keep itself alive; a fresh node will not.
            if isinstance(features, Tensor) and features.grad_fn is result.grad_fn:
                target = result.clone()
                output = _replaced(output, result, target)
            node: Any = target.grad_fn
            node.metadata[self._key] = note = _Note(features)
            node.register_hook(note.release)
        return output

    def _choose(
        self, candidates: list[Tensor], result: Tensor, versions: dict[int, int]
    ) -> Tensor | str:
        """The features that a result was made from, or why they are unclear."""
        chosen = candidates
        if self.side == "input" and len(candidates) > 1:
            chosen = nearest(result, candidates, MAX_NODES)
        if len(chosen) != 1:
            return (
                f"{self._describe()} has {len(candidates)} floating point tensors of two or more "
                f"dimensions as {self.side}, of shapes {[tuple(t.shape) for t in candidates]}; it "
                "is unclear which is the features. Name the module inside or behind it that takes "
                "the features alone, such as an nn.Linear: embedder=<module>."
            )
        if versions.get(id(chosen[0]), chosen[0]._version) != chosen[0]._version:
            return (
                f"{self._describe()} changes its input in place (a ReLU with inplace=True?), so "
                "the features are gone. Make its first operation out-of-place."
            )
        return chosen[0]

    def _warn_of_raw_input(self, features: Tensor) -> None:
        """Warn once if an embedder is likely the whole model, not what follows a frozen trunk.

        The layers of an MLP lie equally deep; in nn.Sequential(trunk, fc) the first lies deeper.
        """
        if self.module is None or self.side == "output" or features.requires_grad or self._warned:
            return
        layers = [n for n, m in self.module.named_modules() if [*m.parameters(recurse=False)]]
        depths = [name.count(".") for name in layers]
        is_image = features.ndim == 4 and features.shape[1] <= 4
        if len(depths) > 1 and (is_image or (features.ndim == 2 and depths[0] > depths[-1])):
            self._warned = True
            warnings.warn(
                f"The features captured at {self._describe()}, of shape {tuple(features.shape)}, "
                "carry no graph, and it seems to hold a trunk: the raw input would be distilled. "
                "Name its last layer, such as embedder=<model>[-1] or embedder=<model>.fc. If they "
                "are features of a frozen trunk, pass features=... to silence this warning.",
                S2SDWarning,
                stacklevel=outside(),
            )


class _Note:
    """The features of a forward, or why there are none; kept by a node of the graph."""

    def __init__(self, features: Tensor | str) -> None:
        self.features = features
        self.version = getattr(features, "_version", 0)

    @uncompiled
    def release(self, *_: object) -> None:
        """As backward passes the node: let go of the features, unless the graph is retained."""
        if not _graph_is_kept():
            retain = "" if _graph_is_kept is bool else ", or call backward(retain_graph=True)"
            self.features = (
                "Backward has freed the graph of these embeddings and released their features. "
                f"Compute every loss before backward{retain}."
            )


class _Hook:
    """A hook that keeps neither the capture nor the module alive; its copies are idle."""

    def __init__(self, capture: FeatureCapture | None = None) -> None:
        self._capture = None if capture is None else weakref.ref(capture)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        """Before the forward or, with its output, after it."""
        if not output and is_compiling():  # one graph break, after the forward, is enough
            return None
        capture = None if self._capture is None else self._capture()
        if capture is None or capture.module is not module or not torch.is_grad_enabled():
            return None
        return capture._note(args, kwargs, *output) if output else capture._remember(args, kwargs)

    def __deepcopy__(self, _: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a pickled model it is a call without effect: loading it needs nothing of ours."""
        return getattr, (contextlib.nullcontext(), "__exit__")


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


def _entries(value: Any) -> dict[Any, Any]:
    """What a dict, list, tuple or dataclass holds directly; of anything else, itself."""
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, MutableMapping):
        return dict(value)
    return getattr(value, "__dict__", {}) if dataclasses.is_dataclass(value) else {0: value}


def _tensors(value: Any) -> list[Tensor]:
    """Those among its entries. Tensors of inference mode have no version, and take no gradient."""
    tensors = [v for v in _entries(value).values() if isinstance(v, Tensor)]
    return [t for t in tensors if not t.is_inference()]


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """The value, or a copy if it is a tuple, with another tensor in the place of one."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple):  # ``_make`` is that of a named tuple
        return getattr(value, "_make", type(value))(new if v is old else v for v in value)
    target = value if isinstance(value, (list, MutableMapping)) else vars(value)
    for key in [k for k, v in _entries(value).items() if v is old]:
        target[key] = new
    return value
