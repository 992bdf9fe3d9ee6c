"""What a run records, and the CSV, the table and the configuration written from it."""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_metric_learning
import ranks
import torch
from evaluate import METRICS
from icons import Icons
from network import Network
from torch import nn

import s2sd_pml

COMPONENTS = ("base", "aux", "distill", "feature_distill")
COLUMNS = ("run", "epoch", "step", "metric", "value", "seconds")
PROGRESS = ("epoch", "step", "seconds", "recorded", "history")
# Flags that change no number.
WHERE = ("output", "quiet", "checkpoint_every", "resume", "export", "no_report")
Scores = dict[str, dict[str, float]]


@dataclass
class Run:
    """A model in training, with its history."""

    name: str
    model: Network
    loss_func: nn.Module
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of training, without evaluation
    recorded: list[dict[str, float]] = field(default_factory=list)  # at each step of this epoch
    history: list[tuple[str, int, int, str, float, float]] = field(default_factory=list)
    scores: Scores = field(default_factory=dict)  # after training: the model's and each head's

    def state_dict(self) -> dict[str, Any]:
        """The position and the history; the model and the loss are parts of their own."""
        return {name: getattr(self, name) for name in PROGRESS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in PROGRESS:
            setattr(self, name, state[name])

    def end_epoch(self) -> None:
        """Record the means over the epoch's steps."""
        self.epoch += 1
        self.record(mean(self.recorded))
        self.recorded = []

    def record(self, values: dict[str, float], name: str = "") -> None:
        """Add a row for every value; ``name`` is the run's own or that of a head."""
        for metric, value in values.items():
            row = (name or self.name, self.epoch, self.step, metric, value, round(self.seconds, 3))
            self.history.append(row)

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Epochs and values of a metric."""
        rows = [row for row in self.history if row[0] == self.name and row[3] == metric]
        return [row[1] for row in rows], [row[4] for row in rows]


def components(loss_func: nn.Module) -> dict[str, float]:
    """The unweighted terms of an S2SDLoss with heads; nothing for a plain loss."""
    terms = loss_func.components if getattr(loss_func, "head_dims", ()) else {}
    return {name: terms[name].item() for name in COMPONENTS if name in terms}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def table(runs: list[Run]) -> str:
    """Metrics in per cent: base, S2SD, their difference, and every head as a teacher."""
    scores = {name: values for run in runs for name, values in run.scores.items()}
    seconds = {run.name: run.seconds for run in runs}
    columns = list(scores)
    if {"base", "S2SD"} <= set(columns):
        columns.insert(2, "difference")
    lines = [["", *columns]]
    for metric in METRICS:
        values = {name: 100 * scores[name][metric] for name in scores}
        lines.append([metric, *_cells(values, columns, "")])
    lines.append(["training time", *_cells(seconds, columns, " s")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in lines
    )


def _cells(values: dict[str, float], columns: list[str], unit: str) -> list[str]:
    cells = {name: f"{value:.1f}{unit}" for name, value in values.items()}
    if "difference" in columns:
        cells["difference"] = f"{values['S2SD'] - values['base']:+.1f}{unit}"
    return [cells.get(name, "") for name in columns]


def title(args: argparse.Namespace, unseen: Icons) -> str:
    """What the table compares."""
    kind = "held-out training" if args.validation else "unseen"
    s2sd = "" if args.baseline_only else f", {args.variant}"
    return (
        f"{args.loss}{s2sd}, embedding size {args.embedding_size}, "
        f"{args.epochs * args.steps_per_epoch} steps, seed {args.seed}; "
        f"{len(unseen.names)} {kind} classes, {len(unseen.labels)} images; per cent"
    )


def write(args: argparse.Namespace, runs: list[Run], unseen: Icons) -> None:
    """metrics.csv, table.md and config.json."""
    output: Path = args.output
    with open(output / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row for run in runs for row in run.history)
    (output / "table.md").write_text(f"{title(args, unseen)}\n\n{table(runs)}\n")
    config = {**vars(args), "ranks": ranks.world(), "versions": versions()}
    (output / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    """Of the packages that make the numbers."""
    return {m.__name__: m.__version__ for m in (torch, pytorch_metric_learning, s2sd_pml)}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that the numbers depend on, in plain values."""
    flags = {name: value for name, value in vars(args).items() if name not in WHERE}
    flags |= {"threads": torch.get_num_threads(), "ranks": ranks.world(), **versions()}
    plain: dict[str, Any] = json.loads(json.dumps(flags, default=str))
    return plain
