"""Parameter groups of the loss, and the guard that watches whether the heads are trained."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook as after_steps
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

from .counter import is_compiling
from .errors import ArgumentError, OptimizerWarning, S2SDWarning, outside
from .rows import parameters_behind
from .validation import check_weight

PATIENCE = 5  # steps of the model after which the guard decides
LATE = 50  # the same where an optimizer holds the heads, but has not stepped them yet
# New layers usually train at 5 to 10 times the trunk's rate, proxies at 100 times and more. Between
# the two, a group that holds heads and proxies was meant for the proxies.
FACTOR = 30
IN_EVAL = (
    "The model was trained through an S2SDLoss in eval() mode: with the base loss, without S2SD. "
    "Call loss_func.train() after validation; model.train() does not reach a loss outside of the "
    "model. To train with the base loss on purpose, call loss_func.loss(...)."
)
RESTORED = (
    "The optimizer has state from before the first step of this S2SDLoss, whose heads and step are "
    "new. If a run is resumed, restore the loss too: save loss_func.state_dict() with each "
    "checkpoint and load it. If S2SD starts here on purpose, ignore this."
)


def param_groups(
    loss_func: nn.Module, heads: list[nn.Parameter], lr: Any, weight_decay: Any, loss_lr: Any
) -> list[dict[str, Any]]:
    """One group for the heads, one for every other parameter of the loss; empty ones left out."""
    loss_lr = lr if loss_lr is None else loss_lr
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("loss_lr", loss_lr)):
        if value is None and name != "weight_decay":  # an optimizer that chooses its own
            continue
        check_weight(name, float(value) if isinstance(value, Tensor) else value)
    ids = _ids(heads)
    others = [p for p in loss_func.parameters() if id(p) not in ids]
    both: list[dict[str, Any]] = [
        {"params": heads, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": loss_lr, "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


def add_to(loss_func: Any, heads: list[nn.Parameter], optimizer: Optimizer, **group: Any) -> None:
    """Add the groups of ``param_groups`` to an optimizer, without what it holds already.

    The default of ``lr`` is the model's rate; that of ``loss_lr`` the rate of the group that holds
    parameters of the base loss, ``loss_func.loss``. Other options are the optimizer's own.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"add_to needs a torch optimizer, not {kind}.")
    groups = optimizer.param_groups
    if any("initial_lr" in g for g in groups):
        raise ArgumentError(
            f"A scheduler was built already for this {kind} with {len(groups)} groups and would "
            "not know new ones. Call loss_func.add_to(optimizer) before you build the scheduler, "
            "and before you load a state that had one."
        )
    defaults = getattr(optimizer, "defaults", {})  # wrappers around an optimizer may have none
    rates = {k: group.pop(k) for k in ("lr", "weight_decay", "loss_lr") if k in group}
    known = {"name", *defaults, *(k for g in groups for k in g)} - {"params", "lr", "weight_decay"}
    if unknown := sorted(set(group) - known):
        raise ArgumentError(
            f"{kind} has no option {', '.join(unknown)}. It has lr, weight_decay and loss_lr, and "
            f"of its own {', '.join(sorted(known))}. For others, such as a scheduler's, add the "
            "groups of loss_func.param_groups(...) yourself."
        )
    if "lr" not in rates:
        rates["lr"] = _model_rate(optimizer, _rate(defaults), _ids(loss_func.parameters()))
    own = _ids(loss_func.loss.parameters())
    loss_lr = next((g.get("lr") for g in groups if own & _ids(g["params"])), None)
    rates = {"weight_decay": 0.0, "loss_lr": loss_lr, **rates}
    held = _held(optimizer)
    for new in param_groups(loss_func, heads, **rates):
        if params := [p for p in new["params"] if id(p) not in held]:
            optimizer.add_param_group({**new, **group, "params": params})


def _model_rate(optimizer: Optimizer, default: Any, ours: set[int]) -> Any:
    """The learning rate of the groups that hold more than our parameters, or else the default.

    Where these groups differ it is the default, if one of them has it. None: no number is known.
    """
    groups = [g for g in optimizer.param_groups if _ids(g["params"]) - ours]
    rates = {float(rate): rate for g in groups if (rate := _rate(g)) is not None}
    if not rates or ours <= _held(optimizer) or (default is not None and float(default) in rates):
        return default
    if len(rates) > 1:
        raise ArgumentError(
            f"The groups of this {type(optimizer).__name__} have learning rates {sorted(rates)}, "
            f"and none of them its own lr={default}. Say which the heads get: add_to(..., lr=...)."
        )
    return next(iter(rates.values()))


def _ids(parameters: Iterable[Tensor]) -> set[int]:
    return {id(p) for p in parameters}


def _alive(refs: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [it for ref in refs if (it := ref()) is not None]


def _held(optimizer: Optimizer) -> set[int]:
    groups = getattr(optimizer, "param_groups", ())  # none while it is being built
    return _ids(p for group in groups for p in group["params"])


def _rate(group: dict[str, Any], key: str = "lr") -> Any:
    """None for what is no number: some optimizers choose their own, old ones mark what is due."""
    rate = group.get(key, group.get("lr"))
    return rate if isinstance(rate, (Real, Tensor)) else None


class OptimizerGuard:
    """Warn, once each, of mistakes that leave the heads untrained or badly trained.

    - The model is stepped and a head is not.
    - The heads' gradients are not cleared between two steps, and the model's are.
    - The heads share a group with proxies, at a rate far above the model's.
    - The optimizer was restored from a checkpoint and the loss was not.
    - The model is trained through a loss in ``eval()`` mode.

    A hook sees the steps of all torch optimizers, at any learning rate. Version counters and, just
    before a warning, values show the steps of others. Nothing is read from the device in a step
    that gives no cause for suspicion, and the guard stops after ``PATIENCE`` good steps.
    """

    def __init__(self) -> None:
        self._done = False
        self._patience = PATIENCE
        self._steps = self._model_steps = 0  # forwards after a step of anything, and of the model
        self._heads: dict[str, weakref.ref[nn.Module]] = {}
        self._start: dict[str, list[tuple[int, Tensor]]] = {}  # first versions and sums of heads
        self._leaves: list[tuple[weakref.ref[Tensor], int]] = []  # of the model, with versions
        self._saw_heads = self._saw_model = False  # the hook, since the last forward
        self._stepped: set[str] = set()  # heads
        self._ids: dict[str, set[int]] = {}  # their parameters outside of a forward
        self._grads: list[weakref.ref[Tensor] | None] = []  # of a head and the leaves, at a step
        self._kept: weakref.ref[Tensor] | None = None  # a head's gradient that two steps have used
        self._rates: dict[str, tuple[Any, float]] = {}  # of the model, and of heads with proxies
        self._said: set[str] = set()
        self._is_new: bool | None = None  # whether the first forward was that of step 0
        self._in_eval: list[weakref.ref[Tensor]] = []  # leaves that backward in eval() mode reached

    def check(self, heads: dict[str, nn.Module], embeddings: Tensor, counter: Any = None) -> None:
        """Look once, in a training forward whose losses have a gradient."""
        self._in_eval = []
        if is_compiling() or self._done:
            return
        if self._is_new is None:
            self._is_new = counter is not None and counter.count == 0
        trained = {n: [p for p in m.parameters() if p.requires_grad] for n, m in heads.items()}
        trained = {name: parameters for name, parameters in trained.items() if parameters}
        self._heads = {name: weakref.ref(module) for name, module in heads.items()}
        for name in trained.keys() - self._start.keys():
            self._start[name] = [(p._version, _local(p).sum()) for p in trained[name]]
        self._watch()
        before = ((ref(), version) for ref, version in self._leaves)
        model = self._saw_model or any(p is not None and p._version != v for p, v in before)
        self._leaves = [(weakref.ref(p), p._version) for p in parameters_behind(embeddings)]
        self._model_steps += model
        self._steps += model or self._saw_heads
        self._is_new = self._is_new and not self._steps
        self._saw_model = self._saw_heads = False
        self._check_steps()
        still = [n for n in trained if n not in self._stepped and self._stands(n, trained[n])]
        if still and self._model_steps >= self._patience:
            self._check_heads(still, trained)
        elif (trained or not heads) and not still and self._steps >= PATIENCE:
            self._stop()

    def check_eval(self, loss: Tensor, embeddings: Tensor, module: nn.Module) -> None:
        """Watch whether an optimizer steps after a backward through a loss in ``eval()`` mode.

        If all its parameters are frozen, as PML's trainers do it, the mode was chosen on purpose.
        """
        if is_compiling() or not loss.requires_grad or IN_EVAL[:40] in self._said:
            return
        if {p.requires_grad for p in module.parameters()} == {False}:
            return
        leaves = [weakref.ref(p) for p in parameters_behind(embeddings, most=2)]  # no generator's
        this = weakref.ref(self)

        def reached(_: Tensor) -> None:
            if (guard := this()) is not None:
                guard._in_eval = leaves
                guard._watch()

        loss.register_hook(reached)  # type: ignore[no-untyped-call]

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Before the first step of a new loss: was its optimizer restored from a checkpoint?"""
        if not self._is_new or optimizer in _stepped:
            return
        held = _held(optimizer)
        heads = [p for m in _alive(self._heads.values()) for p in m.parameters() if id(p) in held]
        model = [p for p in _alive(ref for ref, _ in self._leaves) if id(p) in held]
        if any(_has_state(optimizer, p) for p in heads or model):
            self._warn(RESTORED)

    def stepped(self, optimizer: Optimizer) -> None:
        """Note a step of an optimizer, which may be of another model, while the guard watches."""
        held, in_eval = _held(optimizer), _alive(self._in_eval)
        if held & _ids(in_eval) or _sharded(in_eval, optimizer):
            self._in_eval = []
            self._warn(IN_EVAL)
        if self._done:
            return None if self._in_eval else self._stop()
        leaves = _alive(ref for ref, _ in self._leaves)
        modules = {name: m for name, ref in self._heads.items() if (m := ref()) is not None}
        self._ids = {name: _ids(m.parameters()) for name, m in modules.items()}
        self._stepped |= {name for name, ids in self._ids.items() if ids & held}
        self._saw_heads |= any(ids & held for ids in self._ids.values())
        heads = (ids for name, ids in self._ids.items() if not name.startswith("prefix"))
        in_heads, in_model = set[int]().union(*heads), _ids(leaves)
        self._saw_model |= bool(in_model & held) or _sharded(leaves, optimizer)
        for group in optimizer.param_groups:
            ids, rate = _ids(group["params"]), _rate(group, "initial_lr")  # of a warm-up, its goal
            of = "model" if ids & in_model else "heads" if ids & in_heads and ids - in_heads else ""
            if of and rate is not None and getattr(rate, "is_cpu", True):
                kind = "betas" in group, "eps" in group  # rates of Adam and of SGD do not compare
                self._rates[of] = max(self._rates.get(of, (kind, 0.0)), (kind, float(rate)))
        parameters = (p for m in modules.values() for p in m.parameters())
        # Gradients are read only of what this optimizer holds: others may be at work in a thread.
        first = next((p for p in parameters if id(p) in held and p.grad is not None), None)
        if first is not None:  # have two steps used one gradient of it?
            old, now = self._grads, [p.grad for p in (first, *leaves)]
            pairs = zip(old, now, strict=False)
            same = [r is not None and g is not None and r() is g for r, g in pairs]
            self._grads = [None if g is None else weakref.ref(g) for g in now]
            self._kept = self._grads[0] if any(old[1:]) and same[0] and not any(same[1:]) else None

    def _check_steps(self) -> None:
        """Gradients that pile up, and the rate of heads that share a group with proxies."""
        grad, self._kept = None if self._kept is None else self._kept(), None
        if grad is not None and bool(_local(grad).any()):
            self._warn(
                "The gradients of the auxiliary heads pile up: two steps used the same ones, while "
                "the model's were cleared in between. Call optimizer.zero_grad() instead of "
                "model.zero_grad(), or loss_func.zero_grad() as well."
            )
        kind, model = self._rates.get("model", (None, 0.0))
        other, heads = self._rates.get("heads", (None, 0.0))
        if kind == other and 0 < model * FACTOR <= heads:
            self._warn(
                "The auxiliary heads share an optimizer group with other parameters, such as "
                f"proxies, at lr={heads:g}, {heads / model:.0f} times the model's lr={model:g}. "
                "Heads need about the model's rate. Build that optimizer over "
                f"loss_func.param_groups(lr={model:g}, loss_lr={heads:g}), or use "
                f"loss_func.add_to(optimizer, loss_lr={heads:g}) on the model's instead of it."
            )

    def _stands(self, name: str, parameters: list[nn.Parameter], values: bool = False) -> bool:
        start = self._start[name]
        return len(start) == len(parameters) and all(
            bool(_local(p).sum() == total) if values else p._version == version
            for p, (version, total) in zip(parameters, start, strict=True)
        )

    def _check_heads(self, still: list[str], trained: dict[str, list[nn.Parameter]]) -> None:
        """The costly part, before a warning: the values, and all optimizers of this process."""
        still = [n for n in still if self._stands(n, trained[n], values=True)]
        optimizers = (o for o in gc.get_objects() if issubclass(type(o), Optimizer))
        held = set[int]().union(*map(_held, optimizers))
        forgotten = [n for n in still if not (_ids(trained[n]) | self._ids.get(n, set())) & held]
        if still and not forgotten and self._patience < LATE:
            self._patience = LATE  # they may be stepped rarely
            return
        self._stop()
        why = "They seem to be in no optimizer" if forgotten else "Their optimizer never stepped"
        kinds = "auxiliary heads" + " and prefixes" * any(n.startswith("prefix") for n in trained)
        if still := forgotten or still:
            self._warn(
                f"The model was stepped {self._model_steps} times, but the parameters of "
                f"{len(still)} of the {len(trained)} {kinds} never changed "
                f"({', '.join(still)}). {why}: then S2SD works with untrained ones. Call "
                "loss_func.add_to(optimizer), or build the optimizer over [*model.parameters(), "
                "*loss_func.parameters()]; with a PML trainer pass an optimizer over "
                "loss_func.parameters() as 'metric_loss_optimizer'."
            )

    def _warn(self, text: str) -> None:
        mistake = text[:40]  # the numbers come later
        if mistake not in self._said:
            self._said.add(mistake)
            category = S2SDWarning if text in (IN_EVAL, RESTORED) else OptimizerWarning
            warnings.warn(text, category, stacklevel=outside())

    def _watch(self) -> None:
        _watching[id(self)] = self
        if not _hooks:  # for all losses
            _hooks.extend([before_steps(_before_step), after_steps(_after_step)])

    def _stop(self) -> None:
        self._done = True
        _watching.pop(id(self), None)

    def __getstate__(self) -> dict[str, Any]:
        return OptimizerGuard().__dict__  # a copied or unpickled loss watches anew


_watching: weakref.WeakValueDictionary[int, OptimizerGuard] = weakref.WeakValueDictionary()
_stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # in this process, since the first loss
_hooks: list[Any] = []


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not is_compiling():
        for guard in _alive(_watching.valuerefs()):
            guard.about_to_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not is_compiling():
        _stepped.add(optimizer)
        for guard in _alive(_watching.valuerefs()):
            guard.stepped(optimizer)


def _has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether it has stepped a parameter. A count on a device is not read: it is not 0 there."""
    state = optimizer.state.get(parameter, {})
    step = state.get("step", int("momentum_buffer" in state))
    return bool(step) if getattr(step, "is_cpu", True) else True


def _sharded(leaves: list[Tensor], optimizer: Optimizer) -> bool:
    """Whether it holds DTensors of the leaves' shapes: fully_shard computes with other tensors."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    shapes = {p.shape for p in parameters if type(p) is not nn.Parameter and hasattr(p, "to_local")}
    return bool(shapes and leaves) and all(p.shape in shapes for p in leaves)


def _local(tensor: Tensor) -> Tensor:
    """Its values, of a DTensor those on this rank."""
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()
