"""The metrics as they come, for TensorBoard and, if asked, Weights & Biases."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from typing import Any

FOLDER = "events"


class Events:
    """Writes what a run recorded since the last time. Without TensorBoard it does nothing."""

    def __init__(self, args: argparse.Namespace, name: str, step: int, written: int) -> None:
        self.name, self.written = name, written
        self.writer: Any = None
        self.wandb: Any = None
        if args.wandb:
            wandb = _needed("wandb", "--wandb", "wandb")
            self.wandb = wandb.init(
                project=args.wandb, name=name, dir=args.output, config=vars(args), reinit=True
            )
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(args.output / FOLDER / name, purge_step=step or None)

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


def check(args: argparse.Namespace) -> None:
    """Refuse --wandb without the package, before anything is trained."""
    if args.wandb:
        _needed("wandb", "--wandb", "wandb")


def _needed(module: str, flag: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{flag} needs `pip install {package}`: {error}") from error
