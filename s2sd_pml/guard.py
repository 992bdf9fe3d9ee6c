"""Notice auxiliary heads that no optimizer moves."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn

from .errors import OptimizerWarning

PATIENCE = 3  # optimizer steps of the model that the heads may sit out
MAX_NODES = 400


class OptimizerGuard:
    """Warn once if the model's parameters are stepped and the heads' are not.

    An optimizer writes parameters in place, which their version counters show, even at a learning
    rate of 0. A parameter of the model, found in the graph of the embeddings, sets the pace: any
    number of forwards may accumulate gradients between two steps of it.
    """

    def __init__(self) -> None:
        self._done = False
        self._paced = 0
        self._pace: tuple[weakref.ref[Tensor], int] | None = None
        self._start: dict[str, tuple[int, Tensor]] | None = (
            None  # version and sum of each parameter
        )

    def check(self, heads: dict[str, nn.Module], embeddings: Tensor) -> None:
        """Look once, in a training forward whose auxiliary losses have a gradient."""
        if self._done:
            return
        now = {
            f"{head}.{name}": p
            for head, module in heads.items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        if self._start is None:
            self._start = {name: (p._version, p.detach().sum()) for name, p in now.items()}
        start = self._start
        still = [name for name, p in now.items() if name in start and p._version == start[name][0]]
        if not still:
            self._done = True
        elif self._model_stepped(embeddings):
            self._paced += 1
            if self._paced >= PATIENCE:
                self._done = True
                # an old-fashioned optimizer that writes to p.data leaves no trace in the version
                still = [n for n in still if bool(now[n].detach().sum() == start[n][1])]
                self._warn(still, len(now))

    def _model_stepped(self, embeddings: Tensor) -> bool:
        parameter = self._pace[0]() if self._pace else None
        if self._pace is None or parameter is None:
            parameter = _parameter_behind(embeddings)
            self._pace = None if parameter is None else (weakref.ref(parameter), parameter._version)
            return False
        before = self._pace[1]
        self._pace = (self._pace[0], parameter._version)
        return parameter._version != before

    def _warn(self, still: list[str], total: int) -> None:
        if not still:
            return
        warnings.warn(
            f"The model was stepped {self._paced} times, but {len(still)} of the {total} "
            f"parameters of the auxiliary heads never changed (first: {still[0]}). They are in no "
            "optimizer, so S2SD distils from untrained heads. Mend: loss_func.add_to(optimizer), "
            "or build the optimizer over [*model.parameters(), *loss_func.parameters()]; with a "
            "PML trainer pass an optimizer over loss_func.parameters() as 'metric_loss_optimizer'.",
            OptimizerWarning,
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        return OptimizerGuard().__dict__  # a copied or unpickled loss watches anew


def _parameter_behind(embeddings: Tensor) -> Tensor | None:
    """Some leaf that the embeddings depend on, from the first nodes of their graph."""
    queue: list[Any] = [embeddings.grad_fn]
    seen: set[Any] = {None}
    for _ in range(MAX_NODES):
        if not queue:
            return None
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return node.variable  # type: ignore[no-any-return]
        queue.extend(child for child, _ in node.next_functions)
    return None
