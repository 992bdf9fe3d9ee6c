"""Follow rows of embeddings back through the autograd graph to what was noted on a node.

Operations that select or join rows are replayed on the notes, those known to keep rows in their
order are passed, and everything else is refused: wrong rows would be a silent mistake.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class UnfollowableError(Exception):
    """The rows were joined or reordered in a way that cannot be replayed."""


# Row i of the result comes from row i of the input.
KEEPS_ROWS = set(
    "Abs Add Addcdiv Addcmul Alias Bernoulli Celu Clamp ClampMax ClampMin Clone Contiguous Copy "
    "Cos Div Elu Erf Exp Expm1 FusedDropout Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp "
    "Log Log1p LogSigmoid LogSoftmax MaskedFill Maximum Minimum Mish Mul NanToNum NativeDropout "
    "Neg Pow Prelu PreluKernel Reciprocal Relu Rrelu Rsqrt Rsub Selu Sigmoid Sign Silu Sin "
    "Softmax Softplus Sqrt Sub Tanh Threshold ToCopy Where _DDPSink AdaptiveAvgPool1D "
    "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool1D AvgPool2D Baddbmm Bmm Convolution "
    "CudnnBatchNorm MaxPool2DWithIndices MiopenBatchNorm MkldnnConvolution NativeBatchNorm "
    "NativeGroupNorm NativeLayerNorm".split()
)
# The rows of a matrix product are those of its left factor: the factor's place among the inputs.
LEFT_FACTOR = {"Mm": 0, "Addmm": 1}
# Keeps rows unless it reduces dimension 0: then it is a statistic of the batch, without rows.
REDUCES = set("Amax Amin LinalgVectorNorm Logsumexp Max Mean Min Norm Prod Std Sum Var".split())
# Keep rows if they leave the size of dimension 0 alone.
RESHAPES = set("Expand ReshapeAlias Squeeze UnsafeView Unsqueeze View".split())
# Keep rows if they act on other dimensions than 0.
ACTS_ON_DIMENSIONS = set(
    "Cat Cumsum Flip IndexSelect Permute Select Slice Sort Split SplitWithSizes Stack T Transpose "
    "Unbind".split()
)


def follow_rows(
    tensor: Tensor, noted: Callable[[Any], Tensor | None], max_nodes: int
) -> Tensor | None:
    """The note that leads to ``tensor``, with its rows selected and joined as the tensor's were.

    ``noted`` gives the tensor noted on a node, or None. Without any note the result is None, and
    where it is not known how a note's rows became those of ``tensor``, an UnfollowableError.
    """
    walk = _Walk(noted, max_nodes)
    found = walk.rows(tensor.grad_fn, tensor.output_nr)
    if found is None and walk.left <= 0:
        raise UnfollowableError(
            f"No captured forward within the last {max_nodes} operations before the embeddings."
        )
    if found is not None and len(found) != len(tensor):
        raise UnfollowableError(
            f"There are {len(tensor)} embeddings but {len(found)} rows of captured features. Rows "
            "were selected or merged in a way that cannot be followed."
        )
    return found


def nearest(tensor: Tensor, candidates: list[Tensor], max_nodes: int) -> list[Tensor]:
    """The candidates that ``tensor`` was computed from other than by way of another of them.

    The list is empty if the graph does not show it: one needs no gradient, or it is too large.
    """
    if not all(c.requires_grad for c in candidates):
        return []
    places = {c.view_as(c).grad_fn.next_functions[0]: c for c in candidates}  # type: ignore
    to_visit: list[Any] = [(tensor.grad_fn, tensor.output_nr)]
    seen: set[Any] = {(None, 0)}
    while to_visit and len(seen) < max_nodes:
        place = to_visit.pop()
        if place not in seen:
            to_visit += () if place in places else place[0].next_functions
            seen.add(place)
    return [] if to_visit else [c for place, c in places.items() if place in seen]


def parameters_behind(tensor: Tensor, max_nodes: int = 400, most: int = 8) -> list[Tensor]:
    """The nearest leaves of the graph of ``tensor``: the parameters of its last layers."""
    to_visit = deque([tensor.grad_fn])
    seen: set[Any] = {None}
    leaves: list[Tensor] = []
    while to_visit and len(seen) < max_nodes and len(leaves) < most:
        node: Any = to_visit.popleft()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        to_visit.extend(child for child, _ in node.next_functions)
    return leaves


class _Walk:
    """One depth-first walk, without recursion: a deep model must not exhaust the stack."""

    def __init__(self, noted: Callable[[Any], Tensor | None], max_nodes: int) -> None:
        self.noted = noted
        self.left = max_nodes
        self.done: dict[tuple[Any, int], Tensor | None] = {(None, 0): None}

    def rows(self, node: Any, output: int) -> Tensor | None:
        stack = [(node, output)]
        while stack:
            top = stack[-1]
            children = list(top[0].next_functions)
            missing = [child for child in children if child not in self.done]
            if top in self.done or self.left <= 0:
                self.done.setdefault(top, None)
                stack.pop()
            elif (note := self.noted(top[0])) is not None:
                self.done[stack.pop()] = note
            elif missing:
                stack.extend(reversed(missing))
            else:
                self.left -= 1
                self.done[stack.pop()] = self._replay(*top, children)
        return self.done[node, output]

    def _replay(self, node: Any, output: int, children: list[tuple[Any, int]]) -> Tensor | None:
        sources = [self.done[child] for child in children]
        known = [s for s in sources if s is not None]
        if not known:
            return None
        kind = re.sub(r"Backward\d*$", "", node.name())
        if kind == "BackwardHookFunction":  # torch's identity of several tensors at once
            return sources[output]
        try:
            if kind == "Cat" and _acts_on_rows(node):
                if len(known) < len(sources):
                    raise UnfollowableError(
                        f"{len(sources) - len(known)} of the {len(sources)} parts that were "
                        "concatenated to these embeddings have no captured features: they have no "
                        "graph or come from another embedder (docs/works-with.md, 'Two towers')."
                    )
                return torch.cat(known)
            if (different := len({id(s) for s in known})) > 1:
                raise UnfollowableError(
                    f"{node.name()} merged {different} captured forwards of different features."
                )
            if kind in LEFT_FACTOR and sources[LEFT_FACTOR[kind]] is None:
                raise UnfollowableError(f"{node.name()} mixed the rows of the captured forward.")
            first = next(c for c, s in zip(children, sources, strict=True) if s is not None)
            return _follow(node, kind, output, known[0], _shape(*first))
        except (RuntimeError, IndexError) as error:  # such as saved tensors, freed by backward
            raise UnfollowableError(f"{node.name()} cannot be replayed ({error}).") from None


def _follow(
    node: Any, kind: str, output: int, source: Tensor, before: tuple[int, ...] | None
) -> Tensor | None:
    """What an operation makes of the rows of its input, whose shape is ``before`` if known."""
    after = _shape(node, output)
    if hasattr(node, "_saved_self_sym_sizes"):
        before = tuple(node._saved_self_sym_sizes)
    same_size = before is None or before[:1] == (len(source),)
    rows: Tensor | None = source
    if kind in REDUCES:
        dims = [_from_zero(d, len(before or (0, 0))) for d in _dimensions(node)]
        if not dims or 0 in dims:
            return None
    elif kind == "Index" and same_size:
        rows = _index(node, source)
    elif kind in ACTS_ON_DIMENSIONS and same_size:
        rows = _select(node, kind, output, source) if _acts_on_rows(node) else source
    elif kind in RESHAPES or kind in KEEPS_ROWS or kind in LEFT_FACTOR:
        if kind in KEEPS_ROWS | {"Expand"} and before is not None and after is not None:
            same_size &= len(before) == len(after)  # broadcasting may put another dimension first
    else:
        same_size = False
    if not same_size:
        compiled = " With torch.compile: let the embedder come last, and normalise outside of it."
        raise UnfollowableError(
            f"It is not known whether {node.name()}, from shape {before} to {after}, keeps the "
            f"rows in order.{compiled if kind == 'CompiledFunction' else ''}"
        )
    if rows is None:
        raise UnfollowableError(
            f"{node.name()} moved or reordered the rows after the captured forward. Their order is "
            "not known from there on, even if a later operation restores it."
        )
    if after is not None and after[:1] != (len(rows),):
        raise UnfollowableError(f"{node.name()} made {after} of {len(rows)} captured rows.")
    return rows


def _select(node: Any, kind: str, output: int, source: Tensor) -> Tensor | None:
    """Replay a selection of rows, where it is known how."""
    if kind == "Slice":
        start, stop = _signed(node._saved_start), _signed(node._saved_end)
        rows = source[start : stop : _signed(node._saved_step)]
        return source if len(rows) == len(source) else rows  # x[:, a:b] slices all rows first
    if kind == "Split":
        return torch.split(source, node._saved_split_size)[output]
    if kind == "SplitWithSizes":
        return torch.split(source, list(node._saved_split_sizes))[output]
    if kind == "IndexSelect":
        return source.index_select(0, node._saved_index)
    return None


def _index(node: Any, source: Tensor) -> Tensor | None:
    """Replay ``x[i, j, ...]`` with tensors as indices, where it is known how."""
    places = [k for k, index in enumerate(node._saved_indices) if index is not None]
    indices = [node._saved_indices[k] for k in places]
    if places[0] == 0 and all(index.ndim == 1 for index in indices):
        return source[indices[0]]
    # Indices of other dimensions keep the rows, but apart from each other they come to the front.
    if places[0] > 0 and places[-1] - places[0] == len(places) - 1:
        return source
    return None


def _acts_on_rows(node: Any) -> bool:
    """Whether the operation acts on dimension 0; True if that is not known."""
    if node.name().startswith("Permute"):
        return _from_zero(node._saved_dims[0], len(node._saved_dims)) != 0
    dims = _dimensions(node)
    if not dims:
        return True
    shape = _shape(node, 0)
    if shape is None:  # the rank is unknown: only the last dimension is surely no row
        return any(_signed(d) <= 0 and _signed(d) != -1 for d in dims)
    rank = len(shape) + node.name().startswith(("Select", "Unbind"))
    return 0 in [_from_zero(d, rank) for d in dims]


def _dimensions(node: Any) -> list[int]:
    """The dimensions that the operation was given, as they were given."""
    names = ("_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims")
    values = [getattr(node, name) for name in names if hasattr(node, name)]
    dims = values[0] if values and isinstance(values[0], (tuple, list)) else values
    return [d for d in dims if d is not None]


def _from_zero(dim: int, rank: int) -> int:
    """A dimension counted from 0."""
    dim = _signed(dim)
    return dim if dim >= 0 else dim + rank


def _signed(number: Any) -> Any:
    """Autograd shows negative numbers as unsigned 64-bit ones."""
    return number - 2**64 if isinstance(number, int) and number >= 2**63 else number


def _shape(node: Any, output: int) -> tuple[int, ...] | None:
    """The shape of a node's output; None in torch 2.4 and earlier, which do not show it."""
    metadata = getattr(node, "_input_metadata", None)
    return None if metadata is None else tuple(metadata[output].shape)
