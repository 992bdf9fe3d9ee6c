"""What an S2SDLoss looks like from outside: its settings, the base loss's attributes, loggers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn

from .branches import Branch, MetricLosses
from .counter import StepCounter, rename_step
from .errors import ArgumentError
from .heads import Unowned
from .optimizer import add_to, param_groups
from .teachers import OutsideTeachers

if TYPE_CHECKING:
    from typing_extensions import Self

# What frameworks look for on a module to initialise or unwrap it: never the base loss's.
NOT_FORWARDED = ("weight", "bias", "reset_parameters", "init_weights", "module")
FIXED = ("loss", "head_dims", "feature_dim", "matryoshka_dims")
ONLY_AT_CONSTRUCTION = ("embedder", "trunk", "head", "embedding_size")
SETTINGS = (
    "feature_dim head_dims distill_weight temperature feature_distill_weight feature_distill_delay "
    "pooling exclude_self chunk_size gather_distributed matryoshka_dims teacher_weight"
).split()
RECORDS = ["base_loss", "aux_loss", "distill_loss", "feature_distill_loss"]


class LossWrapper(ModuleWithRecords):  # type: ignore[misc]
    """A module that shows the public attributes of the base loss, ``self.loss``, as its own."""

    loss: nn.Module
    miner: nn.Module | None
    branches: UnrecordedModuleDict
    head_dims: tuple[int, ...]
    matryoshka_dims: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.counter = StepCounter()
        self.components: dict[str, Tensor] = {}
        self._outside = OutsideTeachers()
        self.add_to_recordable_attributes(list_of_names=RECORDS, is_stat=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # not as a hook of load_state_dict: PML's record keeper walks a module's hooks
        rename_step(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def step(self) -> int:
        """Training forwards so far, saved and restored with the state_dict."""
        return self.counter.count

    @step.setter
    def step(self, step: int) -> None:
        self.counter.count = step

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, loss_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups: the heads, and the parameters of base and branch losses, if any.

        Args:
            lr: learning rate of the heads.
            weight_decay: of the heads (the paper's is 0). Loss parameters never decay.
            loss_lr: learning rate of the losses' own parameters, such as proxies or a learnable
                margin; default ``lr``.
        """
        return param_groups(self, self._head_parameters(), lr, weight_decay, loss_lr)

    def add_to(self, optimizer: torch.optim.Optimizer, **group: Any) -> Self:
        """Add the groups of ``param_groups`` to an optimizer, and return the loss.

        Args:
            optimizer: built over the model. The learning rate of the model's groups is the default
                for ``lr``; where they differ, its own, if one of them is trained at that. The rate
                of the group that holds the base loss's parameters is the default for ``loss_lr``.
            **group: lr, weight_decay, loss_lr, and further options of the optimizer's groups.

        Raises:
            ArgumentError: if a scheduler holds the optimizer's groups already, if they leave open
                which learning rate to take, or for an option that the optimizer does not have.

        Parameters that the optimizer holds already are left where they are.
        """
        add_to(self, self._head_parameters(), optimizer, **group)
        return self

    @property
    def _branches(self) -> dict[str, Branch]:
        return dict(self.branches.items())  # type: ignore[arg-type]

    @property
    def _losses(self) -> MetricLosses:
        every: list[Any] = [self, *self._branches.values()]
        return MetricLosses([of.loss for of in every], [of.miner for of in every])

    @property
    def _trained(self) -> dict[str, nn.Module]:
        """What an optimizer must hold: the heads, and the losses of prefixes."""
        branches = self._branches.items()
        return {n: branch.head if n.startswith("head") else branch for n, branch in branches}

    def _head_parameters(self) -> list[nn.Parameter]:
        return [p for branch in self._branches.values() for p in branch.head.parameters()]

    def _record(self, L: Tensor, KL: Tensor, others: Iterable[str] = ()) -> None:
        """Keep the components, all keys every time: loggers want series of equal length.

        Args:
            L: of the students and heads, or of the whole embedding alone.
            KL: of the heads and others, or empty.
            others: components of the teachers that are no heads.
        """
        zero, n, m = L.new_zeros(()), 1 + len(self.matryoshka_dims), len(self.head_dims)
        prefixes, aux = list(L[1:n]) or [zero] * (n - 1), list(L[n:]) or [zero] * m
        kl = list(KL[:m]) or [zero] * m
        self.components = {
            "base": L[0],
            "aux": L[n:].mean() if len(L) > n else zero,
            "distill": KL[:m].mean() if m and len(KL) else zero,
            "feature_distill": zero,
        }
        for dim, aux_loss, divergence in zip(self.head_dims, aux, kl, strict=True):
            self.components |= {f"aux_{dim}": aux_loss, f"distill_{dim}": divergence}
        for dim, prefix_loss in zip(self.matryoshka_dims, prefixes, strict=True):
            self.components[f"base_{dim}"] = prefix_loss
        self.components |= {f"teacher_{name}": zero for name in self._outside.names}
        self.components |= dict(zip(others, KL[m:], strict=True))
        if self.collect_stats:
            for record in RECORDS:
                setattr(self, record, self.components[record.removesuffix("_loss")].item())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)

    def __setattr__(self, name: str, value: Any) -> None:
        check_assignable(self, name, value)
        if name == "pooling" and isinstance(value, nn.Module):
            value = Unowned(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the base loss, such as its proxies, where there is none here."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            base = self.__dict__.get("_modules", {}).get("loss")
            if base is None or name.startswith("_"):
                raise
            fix = f", and neither has loss_func.loss, the base loss {type(base).__name__}."
            if hasattr(base, name):
                if name not in NOT_FORWARDED:
                    return getattr(base, name)
                fix = f". Use loss_func.loss.{name}."
            raise AttributeError(f"S2SDLoss has no {name!r}{fix}") from error


def check_assignable(loss_func: nn.Module, name: str, value: Any) -> None:
    """An attribute that is not fixed when the loss is built, and is not the base loss's own."""
    held = {**loss_func.__dict__, **loss_func.__dict__.get("_modules", {})}
    is_ours = type(loss_func).__module__.startswith(__package__)  # a subclass may have more names
    wraps = isinstance(value, nn.Module) and held.get(name) in [*value.modules()]  # as FSDP does
    if (is_ours and name in ONLY_AT_CONSTRUCTION) or (name in FIXED and name in held and not wraps):
        seen = type(value).__name__ if isinstance(value, nn.Module) else value
        raise ArgumentError(
            f"{name}={seen} cannot be assigned: all spaces are built for the {name} that was "
            f"given. Build a new S2SDLoss(..., {name}=...)."
        )
    if not is_ours or "_guard" not in held or name in held or name.startswith("_"):
        return  # a subclass's, under construction, or ours
    if hasattr(held["loss"], name) and not hasattr(type(loss_func), name):
        plain = value is None or isinstance(value, (bool, int, float, str))
        seen = repr(value) if plain else "<value>"
        raise ArgumentError(
            f"{name}={seen} would not reach the base losses, which have it. Assign it to each, "
            "where it fits the embedding size: "
            f"for m in [loss_func, *loss_func.branches.values()]: m.loss.{name} = {seen}"
        )


class UnrecordedModuleDict(nn.ModuleDict):
    """A ModuleDict whose children PML's record keeper does not walk.

    record_keeper follows every attribute that is a module or a dict, and turns each parameter it
    meets into a Python list at each logged step: the paper's heads are 18 million numbers. A module
    keeps its children in a dict. Here it is a ``UserDict``: torch sees the same mapping, and
    record_keeper sees no dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._modules = UserDict()  # type: ignore[assignment]
