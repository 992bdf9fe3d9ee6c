"""The metrics as they come, for TensorBoard and, if asked, Weights & Biases."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
from typing import Any

FOLDER = "events"


class Events:
    """Writes what a run recorded since the last time. Without TensorBoard it does nothing."""

    def __init__(self, args: argparse.Namespace, name: str, step: int, written: int) -> None:
        self.name, self.written = name, written
        self.writer: Any = None
        self.wandb: Any = None
        folder = args.output / FOLDER / name
        if step == 0:  # of an earlier run
            shutil.rmtree(folder, ignore_errors=True)
        if args.wandb:
            self.wandb = check(args).init(
                project=args.wandb, name=name, dir=args.output, config=vars(args), reinit=True
            )
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, history: list[tuple[str, int, int, str, float, float]]) -> None:
        """Rows of metrics.csv."""
        for who, _, step, metric, value, _ in history[self.written :]:
            tag = metric if who == self.name else f"{who}/{metric}"
            if self.writer:
                self.writer.add_scalar(tag, value, step)
            if self.wandb:
                self.wandb.log({tag: value, "step": step})
        self.written = len(history)
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """After the last."""
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


def check(args: argparse.Namespace) -> Any:
    """The package that --wandb needs; refused before anything is trained, if it is missing."""
    if not args.wandb:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"--wandb needs `pip install wandb`: {error}") from error
