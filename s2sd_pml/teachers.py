"""Outside teachers: what a call may pass, and what each of them weighs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .counter import is_compiling
from .errors import BatchError, S2SDWarning, outside
from .validation import check_device, check_floating

Schedule = float | Callable[[int], float]
TeacherWeight = Schedule | Mapping[str, Schedule]


def has_weight(weight: Any) -> bool:
    """Whether a weight is a schedule, a number other than 0, or given for some teacher."""
    return callable(weight) or bool(weight if isinstance(weight, Mapping) else weight != 0)


class OutsideTeachers:
    """Checks the outside teachers of every step, and remembers their names."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._said_detached = False

    def checked(
        self, teachers: Any, weight: TeacherWeight, embeddings: Tensor
    ) -> dict[str, Tensor]:
        """The teachers of a training step, in the order of their names.

        Raises:
            BatchError: for what is no dict of tensors (B, width), and for names that do not fit
                ``teacher_weight`` or those of the steps before.
        """
        given = {} if teachers is None else teachers
        if not isinstance(given, Mapping):
            raise BatchError(
                f"teachers is a {type(given).__name__}. Pass a dict of tensors (B, width) by name, "
                "such as teachers={'clip': features}."
            )
        if odd := [name for name in given if not isinstance(name, str)]:
            raise BatchError(
                f"teachers has the name {odd[0]!r}. Names are strings: {{{str(odd[0])!r}: tensor}}."
            )
        names = tuple(sorted(given))
        self._check_names(names, weight)
        for name in names:
            self._check_teacher(f"teachers[{name!r}]", given[name], embeddings)
        return {name: given[name] for name in names}

    def remember(self, teachers: dict[str, Tensor]) -> None:
        """The names of a step that no rank refused."""
        if teachers and not is_compiling():
            self.names = tuple(teachers)

    def _check_names(self, names: tuple[str, ...], weight: TeacherWeight) -> None:
        """Every teacher has a weight, every weight a teacher, and the names stay the same."""
        seen = list(names)
        if names and not has_weight(weight):
            raise BatchError(
                f"teachers={seen} would teach nothing, for teacher_weight={weight!r}. Give them a "
                "weight, S2SDLoss(..., teacher_weight=10.0), or leave them out. To record their KL "
                f"alone, use teacher_weight={dict.fromkeys(seen, 0.0)}."
            )
        if has_weight(weight) and not names:
            raise BatchError(
                f"teacher_weight={weight!r}, but this training step has no teachers. Call "
                "loss_func(embeddings, labels, teachers={name: tensor (B, width)}), or set "
                "loss_func.teacher_weight = 0.0. To validate, call loss_func.eval()."
            )
        if isinstance(weight, Mapping):
            if names and set(names) != set(weight):
                raise BatchError(
                    f"teachers={seen} but teacher_weight has weights for {sorted(weight)}. "
                    "Give every teacher a weight, which may be 0.0 or a function of the step, and "
                    "pass every teacher in every training step."
                )
        elif names and self.names not in ((), names) and not is_compiling():
            raise BatchError(
                f"teachers={seen}, but they were {list(self.names)} in the steps before. Pass the "
                "same ones in every step. To change them, give one weight per name: "
                f"loss_func.teacher_weight = {dict.fromkeys(seen, 1.0)}."
            )

    def _check_teacher(self, name: str, x: Any, embeddings: Tensor) -> None:
        check_floating(x, name)
        if x.ndim != 2 or x.shape[1] == 0:
            raise BatchError(
                f"{name} has shape {tuple(x.shape)}. Pass (B, width) with a width above 0; pool a "
                "map first, such as .mean(dim=(2, 3))."
            )
        if len(x) != len(embeddings):
            raise BatchError(
                f"{name} has {len(x)} rows but there are {len(embeddings)} embeddings. Pass what "
                "the teacher makes of the same batch, in the same order."
            )
        check_device(x, embeddings, name)
        if x.requires_grad and not (self._said_detached or is_compiling()):
            self._said_detached = True
            warnings.warn(
                f"{name} has an autograd graph and is detached: no gradient reaches the teacher. "
                "Compute it under torch.no_grad(), which saves its memory.",
                S2SDWarning,
                stacklevel=outside(),
            )
