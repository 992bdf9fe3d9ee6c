"""Follow rows of embeddings back through the autograd graph to what was noted on a node.

Rows keep their order through nearly every operation of an embedder. The operations that select or
join rows are replayed on the notes; those known to reorder or mix rows are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class UnfollowableError(Exception):
    """The rows were joined or reordered in a way that cannot be replayed."""


# Operations that move rows if they act on dimension 0, and are not replayed here.
ROW_MOVING = (
    "FlipBackward0 RollBackward0 GatherBackward0 SortBackward0 TopkBackward0 ScatterBackward0 "
    "ScatterBackward1 ScatterAddBackward0 IndexPutBackward0 IndexAddBackward0 IndexCopyBackward0 "
    "RepeatBackward0 MaskedSelectBackward0 TakeBackward0 TBackward0 StackBackward0 "
    "UnbindBackward0 SelectBackward0 CumsumBackward0 TransposeBackward0 PermuteBackward0"
).split()

# The rows of a matrix product are those of its left factor: the factor's place among the inputs.
LEFT_FACTOR = {"MmBackward0": 0, "AddmmBackward0": 1}


def follow_rows(
    tensor: Tensor, noted: Callable[[Any], Tensor | None], max_nodes: int
) -> Tensor | None:
    """The note that leads to ``tensor``, with its rows selected and joined as the tensor's were.

    Args:
        tensor: has a grad_fn.
        noted: node -> the tensor noted on it, or None.
        max_nodes: give up after that many nodes.

    Returns:
        A tensor with as many rows as ``tensor``, or None if no note was found.
    """
    found = _Walk(noted, max_nodes).rows(tensor.grad_fn, tensor.output_nr)
    if found is not None and len(found) != len(tensor):
        raise UnfollowableError(
            f"The captured features have {len(found)} rows and the embeddings {len(tensor)}: rows "
            "were selected or merged in a way that cannot be followed."
        )
    return found


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
            children = list(top[0].next_functions) if top[0] is not None else []
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
                self.done[stack.pop()] = self._replay(*top, [self.done[c] for c in children])
        return self.done[node, output]

    def _replay(self, node: Any, output: int, sources: list[Tensor | None]) -> Tensor | None:
        present = {id(s): s for s in sources if s is not None}
        if not present:
            return None
        name = node.name()
        try:
            if name == "CatBackward0" and _acts_on_rows(node):
                if any(s is None for s in sources):
                    raise UnfollowableError(
                        f"{sources.count(None)} of the {len(sources)} parts that were concatenated "
                        "to these embeddings have no captured features."
                    )
                return torch.cat([s for s in sources if s is not None])
            if name in LEFT_FACTOR and sources[LEFT_FACTOR[name]] is None:
                raise UnfollowableError(f"{name} mixed the rows of the captured forward.")
            if len(present) > 1:
                raise UnfollowableError(
                    f"{name} merged {len(present)} captured forwards with different features."
                )
            return _select_rows(node, name, output, next(iter(present.values())))
        except RuntimeError as error:  # the graph's saved tensors are freed by backward
            raise UnfollowableError(f"{name} cannot be replayed ({error}).") from None


def _select_rows(node: Any, name: str, output: int, source: Tensor) -> Tensor:
    """Replay a selection of rows; let operations that leave the rows alone pass."""
    if name == "IndexBackward0":
        index = node._saved_indices[0]
        return source if index is None else source[index]
    if name == "SliceBackward0" and _acts_on_rows(node):
        start, stop = _signed(node._saved_start), _signed(node._saved_end)
        rows = source[start : stop : _signed(node._saved_step)]
        return source if len(rows) == len(source) else rows  # x[:, a:b] slices all rows first
    if name == "SplitBackward0" and _acts_on_rows(node):
        return torch.split(source, node._saved_split_size)[output]
    if name == "SplitWithSizesBackward0" and _acts_on_rows(node):
        return torch.split(source, list(node._saved_split_sizes))[output]
    if name == "IndexSelectBackward0" and _acts_on_rows(node):
        return source.index_select(0, node._saved_index)
    if name in ROW_MOVING and _acts_on_rows(node):
        raise UnfollowableError(f"{name} reordered the rows after the captured forward.")
    return source


def _acts_on_rows(node: Any) -> bool:
    """Whether dimension 0 is among those that the operation acts on; True if it does not tell."""
    name = node.name()
    if name == "PermuteBackward0":
        return bool(_from_zero(node._saved_dims[0], node) != 0)
    for attributes in (("_saved_dim",), ("_saved_dim0", "_saved_dim1"), ("_saved_dims",)):
        values = [getattr(node, a) for a in attributes if hasattr(node, a)]
        if values:
            dims = values[0] if isinstance(values[0], tuple) else values
            return 0 in [_from_zero(d, node) for d in dims]
    return True


def _from_zero(dim: int, node: Any) -> int:
    """A dimension counted from 0."""
    dim = _signed(dim)
    if dim >= 0:
        return dim
    if not hasattr(node, "_input_metadata"):  # before torch 2.2: only the last one is no row
        return 1 if dim == -1 else 0
    rank = len(node._input_metadata[0].shape)  # of the operation's result
    return dim + rank + (node.name() in ("SelectBackward0", "UnbindBackward0"))


def _signed(number: Any) -> Any:
    """Autograd shows negative numbers as unsigned 64-bit ones."""
    return number - 2**64 if isinstance(number, int) and number >= 2**63 else number
