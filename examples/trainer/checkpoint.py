"""Checkpoints that are written whole or not at all, and loaded without running code of theirs.

A run is a dict of parts, each with a state_dict and a load_state_dict of tensors and plain values.
"""

from __future__ import annotations

import os
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import ranks

KIND = "checkpoint of the example trainer, version 1"
State = dict[str, Any]


class CheckpointError(ValueError):
    """A file that cannot be used, by name, and why."""


def write(content: State, path: Path) -> None:
    """Write a file at once: whoever looks finds the old one or the new one, never a part."""
    temporary = path.parent / f".{path.stem}.tmp"
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # so that the new name survives a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read(path: Path, kind: str) -> State:
    """The content of a whole file of a kind."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise CheckpointError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise CheckpointError(f"it is no {kind}")
    except Exception as error:  # torch and zipfile raise many
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be used: {reason}.") from error
    return content


def files(folder: Path, run: str = "*") -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"{run}-{'[0-9]' * 8}.pt"))


def save(folder: Path, run: str, step: int, settings: State, parts: dict[str, Any]) -> None:
    """Write a checkpoint, then delete all others but the one before it.

    Later ones, left by a run that was resumed from an earlier step, are of no use any more.
    """
    folder.mkdir(exist_ok=True)
    states = {name: part.state_dict() for name, part in parts.items()}
    path = folder / f"{run}-{step:08d}.pt"
    write({"kind": KIND, "settings": settings, "states": states}, path)
    every = files(folder, run)
    place = every.index(path)
    for useless in every[: max(place - 1, 0)] + every[place + 1 :]:
        useless.unlink()


def newest(folder: Path, run: str, settings: State) -> State | None:
    """The states in the newest whole checkpoint of a run with these settings; None without any."""
    found = files(folder, run)
    for path in reversed(found):
        try:
            content = read(path, KIND)
        except CheckpointError as error:
            if ranks.rank() == 0:
                warnings.warn(f"{error} Trying the one before it.", stacklevel=2)
            continue
        _same(content["settings"], settings, path)
        return content["states"]  # type: ignore[no-any-return]
    if found:
        raise CheckpointError(
            f"None of {', '.join(map(str, found))} can be used. Delete them to start anew."
        )
    return None


def _same(then: State, now: State, path: Path) -> None:
    other = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if other:
        raise CheckpointError(
            f"{path} was written with other settings: {'; '.join(other)}. Use the same, or start "
            "anew with another --output."
        )


def seed(number: int) -> None:
    """Seed all global random streams."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


class RandomStates:
    """The global random states, of PyTorch, NumPy and Python, as a part."""

    def state_dict(self) -> State:
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
            "numpy": numpy_state(np.random),
            "python": random.getstate(),
        }

    def load_state_dict(self, state: State) -> None:
        torch.set_rng_state(state["torch"])
        for own in state["cuda"]:
            torch.cuda.set_rng_state(own)
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])


def numpy_state(generator: Any) -> tuple[Any, ...]:
    """The state of ``numpy.random`` or of a RandomState, in plain values."""
    kind, keys, *rest = generator.get_state()
    return (kind, keys.tolist(), *rest)
