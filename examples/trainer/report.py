"""What a run records, and the CSV, the table and the configuration written from it."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_metric_learning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s2sd_pml
from s2sd_pml import S2SDLoss

from . import ranks
from .baselines import principal
from .evaluate import evaluate, spaces_of
from .images import Images, Split
from .network import Network, pool
from .tables import COLUMNS, FIRST, REFIT, Row, Rows, table

COMPONENTS = ("base", "aux", "distill", "feature_distill")
PROGRESS = ("epoch", "step", "chosen", "seconds", "recorded", "history")
# What a repeated run has anew.
UNREPEATED = (
    *("recipe", "config", "dry_run", "resume", "output", "export", "checkpoint_every", "wandb"),
    *("report", "quiet"),
)
# Flags that change no number; of the data, its fingerprint counts.
WHERE = (*UNREPEATED, "workers", "root")
Scores = dict[str, dict[str, float]]


@dataclass
class Run:
    """A model in training, with its history."""

    name: str
    model: Network
    loss_func: nn.Module
    trained: Network  # the same, unless --ema tests an average; the heads go with this one
    epoch: int = 0
    step: int = 0
    chosen: int = 0  # the epoch that --choose-epoch tests
    seconds: float = 0.0  # of training, without evaluation
    recorded: list[dict[str, float]] = field(default_factory=list)  # at each step of this epoch
    history: list[Row] = field(default_factory=list)
    # After training: each part of the data in the spaces of the embeddings, the features and the
    # heads; and the scores of the first and the last, by name.
    spaces: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    refitted: nn.Linear | None = None  # the embedder of --refit, tested as well as the model's own
    refit_seconds: float = 0.0  # what it took

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

    def record(self, values: dict[str, float]) -> None:
        """Add a row for every value."""
        self.history += self._rows(self.name, values)

    def rows(self) -> list[Row]:
        """The history and then the scores, the run's own and those of the heads."""
        chosen = self.chosen or self.epoch
        final = [
            row for who, values in self.scores.items() for row in self._rows(who, values, chosen)
        ]
        return self.history + final

    def line(self, epochs: int) -> str:
        """This epoch, for a log."""
        values = [f"{m} {v:.3g}" for _, epoch, _, m, v, _ in self.history if epoch == self.epoch]
        where = f"{self.name}: epoch {self.epoch} of {epochs}, step {self.step}"
        return ", ".join([where, *values, f"{self.seconds:.0f} s"])

    def _rows(self, who: str, values: dict[str, float], epoch: int | None = None) -> list[Row]:
        seconds = self.seconds + (self.refit_seconds if who.endswith(REFIT) else 0.0)
        now, epoch = round(seconds, 3), self.epoch if epoch is None else epoch
        return [(who, epoch, self.step, metric, v, now) for metric, v in values.items()]

    def project(self, images: Images, workers: int = 0) -> dict[str, Tensor]:
        """ "embeddings", "features" and "head D" of all images, in one pass."""

        def spaces(batch: Tensor) -> dict[str, Tensor]:
            features = self.model.trunk(batch)
            found = {"embeddings": self.model.embedder(pool(features)), "features": pool(features)}
            if isinstance(self.loss_func, S2SDLoss) and self.loss_func.head_dims:
                own = features if self.trained is self.model else self.trained.trunk(batch)
                heads = self.loss_func.project(own)
                found |= {f"head {dim}": heads[dim] for dim in heads}
            return found

        return spaces_of([self.model, self.trained], spaces, images, workers)

    def score(
        self,
        split: Split,
        workers: int = 0,
        cuts: Sequence[int] = (),
        prefixes: Sequence[int] = (),
        nmi: bool = True,
    ) -> None:
        """All metrics of the model and, for S2SD, of every head as if it were the embedder.

        Args:
            cuts: sizes to cut the model's embeddings to, plainly and by PCA of the training set.
            prefixes: sizes to cut them to plainly.
        """
        parts = {"test": split.test} | ({"gallery": split.gallery} if split.gallery else {})
        self.spaces = {part: self.project(images, workers) for part, images in parts.items()}
        for spaces in self.spaces.values() if self.refitted else ():
            spaces[REFIT] = self.refitted(spaces["features"]).detach()
        if cuts:
            fitted = F.normalize(self.project(split.train, workers)["embeddings"], dim=1)
            mean, directions = principal(fitted)
        for spaces in self.spaces.values():
            whole = F.normalize(spaces["embeddings"], dim=1)
            for cut in sorted({*cuts, *prefixes}):
                spaces[f"{self.name}, {FIRST}{cut}"] = whole[:, :cut]
            for cut in cuts:
                spaces[f"PCA {cut}"] = (whole - mean) @ directions[:, :cut]
        for space, embeddings in self.spaces["test"].items():
            if space != "features":
                own = {"embeddings": self.name, REFIT: f"{self.name}, {REFIT}"}
                name = own.get(space, space)
                gallery = self.gallery(split, space)
                self.scores[name] = evaluate(embeddings, split.test.labels, split.ks, gallery, nmi)

    def gallery(self, split: Split, space: str) -> tuple[Tensor, Tensor] | None:
        """What is searched, where that is not the test images themselves."""
        if split.gallery is None:
            return None
        return self.spaces["gallery"][space], split.gallery.labels


def components(loss_func: nn.Module) -> dict[str, float]:
    """The unweighted terms of an S2SDLoss with heads; nothing for a plain loss."""
    terms = loss_func.components if getattr(loss_func, "head_dims", ()) else {}
    return {name: terms[name].item() for name in COMPONENTS if name in terms}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def title(args: argparse.Namespace, split: Split) -> str:
    """What the table compares."""
    shared = len(set(split.train.names) & set(split.test.names))
    kind = "held-out training" if args.validation else "unseen"
    if shared and not args.validation:
        kind = f"test (of which {shared} are training classes too)"
    s2sd = "" if args.baseline_only else f", {args.variant}"
    seeds = f"seed {args.seed}"
    if len(args.seeds) > 1:
        seeds = f"mean of {len(args.seeds)} seeds ({', '.join(map(str, args.seeds))})"
    return (
        f"{args.dataset}: {args.loss}{s2sd}, embedding size {args.embedding_size}, "
        f"{args.epochs * args.steps_per_epoch} steps, {seeds}; "
        f"{len(split.test.names)} {kind} classes, {len(split.test)} images; values in %"
    )


def counts(split: Split) -> str:
    """What is trained and tested with."""
    lines = ["| | classes | images | smallest class | largest |", "| --- |" + " ---: |" * 4]
    for part, images in zip(("train", "test", "gallery"), split[:3], strict=True):
        if images is not None:
            sizes = images.labels.bincount(minlength=len(images.names))
            sizes = sizes[sizes > 0]
            cells = (part, len(sizes), len(images), int(sizes.min()), int(sizes.max()))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(args: argparse.Namespace, runs: list[Run], split: Split) -> None:
    """metrics.csv, table.md and config.json of one seed."""
    rows = [row for run in runs for row in run.rows()]
    write_rows(args.output, COLUMNS, rows)
    (args.output / "table.md").write_text(f"{title(args, split)}\n\n{table([rows])}\n")
    write_config(args)


def write_seeds(args: argparse.Namespace, seeds: Sequence[Rows], split: Split) -> None:
    """The same of several seeds, whose own results are in folders of --output."""
    named = [(n, *row) for n, rows in zip(args.seeds, seeds, strict=True) for row in rows]
    write_rows(args.output, ("seed", *COLUMNS), named)
    (args.output / "table.md").write_text(f"{title(args, split)}\n\n{table(seeds)}\n")
    write_config(args)


def write_rows(folder: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """metrics.csv."""
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def other_run(args: argparse.Namespace) -> bool:
    """Whether --output holds the results of a finished run with other settings."""
    path = args.output / "config.json"
    if not (path.exists() and (args.output / "metrics.csv").exists()):
        return False
    known = json.loads(path.read_text())
    several = len(args.seeds) > 1
    if several != ("seeds" in known):
        return True
    grown = {"seed", "seeds"} if several else set()  # seeds may be added
    now = {name: v for name, v in resolved(args).items() if name not in {*WHERE, *grown}}
    return {**known, **now} != known


def finished(args: argparse.Namespace) -> bool:
    """Whether --output holds the results of this very run, of one seed."""
    return (args.output / "metrics.csv").exists() and not other_run(args)


def write_config(args: argparse.Namespace) -> None:
    """config.json: every setting as it was resolved, for --config, and what else made the run."""
    config = resolved(args)
    config |= {"command": shlex.join(sys.argv), "ranks": ranks.world(), "versions": versions()}
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def resolved(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that another run repeats, in plain values."""
    config = {name: v for name, v in vars(args).items() if name not in UNREPEATED}
    del config["seed" if len(args.seeds) > 1 else "seeds"]
    return _plain({**config, "device": torch.device(args.device).type})  # rank 0's has a number


def fingerprint(split: Split) -> str:
    """Changes with the classes, the labels and the names of files, wherever these lie."""
    digest = hashlib.sha256()
    for images in split[:3]:
        if images is not None:
            digest.update(repr((images.names, images.labels.tolist())).encode())
            digest.update(repr([path.name for path in getattr(images, "paths", ())]).encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the packages that make the numbers."""
    return {m.__name__: m.__version__ for m in (torch, pytorch_metric_learning, s2sd_pml)}


def settings(args: argparse.Namespace, split: Split) -> dict[str, Any]:
    """All that the numbers depend on, in plain values."""
    flags = {name: v for name, v in vars(args).items() if name not in (*WHERE, "seeds")}
    flags |= {"data": fingerprint(split), "device": torch.device(args.device).type}
    flags |= {"threads": torch.get_num_threads(), "ranks": ranks.world(), **versions()}
    return _plain(flags)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
