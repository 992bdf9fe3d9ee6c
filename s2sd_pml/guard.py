"""Notice auxiliary heads that no optimizer moves."""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OptimizerWarning

PATIENCE = 5  # optimizer steps of the model that the heads may sit out
MAX_NODES = 400
LEAVES = 8
INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__)


class OptimizerGuard:
    """Warn once if the model's parameters are stepped and a head's are not.

    An optimizer writes parameters in place, which their version counters show, even at a learning
    rate of 0. Some parameters of the model, found in the graph of the embeddings, set the pace: any
    number of forwards may accumulate gradients between two steps of them.
    """

    def __init__(self) -> None:
        self._done = False
        self._paced = 0
        self._pace: dict[weakref.ref[Tensor], int] = {}  # leaves of the model: their versions
        self._start: dict[str, list[tuple[int, Tensor]]] = {}  # versions and sums at the start

    def check(self, heads: dict[str, nn.Module], embeddings: Tensor) -> None:
        """Look once, in a training forward whose auxiliary losses have a gradient."""
        if self._done:
            return
        trained = {n: [p for p in m.parameters() if p.requires_grad] for n, m in heads.items()}
        trained = {name: parameters for name, parameters in trained.items() if parameters}
        if not self._start:
            self._start = {
                n: [(p._version, p.detach().sum()) for p in ps] for n, ps in trained.items()
            }
        still = [name for name, ps in trained.items() if self._versions_stand(name, ps)]
        if not still:
            self._done = True
        elif self._model_stepped(embeddings):
            self._paced += 1
            if self._paced >= PATIENCE:
                self._done = True
                # an old-fashioned optimizer that writes to p.data leaves no trace in the version
                self._warn([n for n in still if self._values_stand(n, trained[n])], len(trained))

    def _versions_stand(self, name: str, parameters: list[nn.Parameter]) -> bool:
        start = self._start.get(name, [])
        pairs = zip(parameters, start, strict=False)
        return len(start) == len(parameters) and all(p._version == v for p, (v, _) in pairs)

    def _values_stand(self, name: str, parameters: list[nn.Parameter]) -> bool:
        pairs = zip(parameters, self._start[name], strict=True)
        return all(bool(p.detach().sum() == total) for p, (_, total) in pairs)

    def _model_stepped(self, embeddings: Tensor) -> bool:
        before = {ref: version for ref, version in self._pace.items() if ref() is not None}
        if not before:
            leaves = _parameters_behind(embeddings)
            self._pace = {weakref.ref(leaf): leaf._version for leaf in leaves}
            return False
        leaves_now = ((ref, ref()) for ref in before)
        self._pace = {ref: leaf._version for ref, leaf in leaves_now if leaf is not None}
        return self._pace != before

    def _warn(self, still: list[str], total: int) -> None:
        if not still:
            return
        warnings.warn(
            f"The model was stepped {self._paced} times, but the parameters of {len(still)} of the "
            f"{total} auxiliary heads never changed ({', '.join(still)}). They seem to be in no "
            "optimizer: then S2SD distils from untrained heads. Mend: loss_func.add_to(optimizer), "
            "or build the optimizer over [*model.parameters(), *loss_func.parameters()]; with a "
            "PML trainer pass an optimizer over loss_func.parameters() as 'metric_loss_optimizer'.",
            OptimizerWarning,
            stacklevel=outside(),
        )

    def __getstate__(self) -> dict[str, Any]:
        return OptimizerGuard().__dict__  # a copied or unpickled loss watches anew


def outside() -> int:
    """The stack level, for the caller, of the first frame that is neither ours nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    return level


def _parameters_behind(embeddings: Tensor) -> list[Tensor]:
    """The nearest leaves that the embeddings depend on."""
    queue = deque([embeddings.grad_fn])
    seen: set[Any] = {None}
    leaves: list[Tensor] = []
    while queue and len(seen) < MAX_NODES and len(leaves) < LEAVES:
        node: Any = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        queue.extend(child for child, _ in node.next_functions)
    return leaves
