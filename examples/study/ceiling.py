"""How good an embedding is that copies its teachers: an estimate of what the KL can give.

    python examples/study/ceiling.py --validation --sizes 8 16 32 64
    python examples/study/ceiling.py --recipe emoji-lite0-msim --seeds 0 --temperature 0.1 \\
        --exclude-self

Trains a network with auxiliary heads without distillation, freezes it, and fits a linear
embedder of every size to its features:

    base              by the base loss alone, on the training images
    base + KL         with γ times the KL to the heads as well: --distill-weight, --temperature
    KL                by the KL alone
    KL, tested images by the KL alone, on the very images that are tested: no method, but an
                      estimate of what copying these teachers could give at best
    heads             the teachers themselves, joined: their mean cosine
    trained jointly   the embedder of --embedding-size that was trained with the trunk

The trunk is the same for all, so what the KL adds is seen without its noise. With --baseline-only
it is that of the base loss, without heads, and embedders are fitted by the base loss alone. Flags
but --sizes and --seeds are those of train.py. Writes ceiling.csv, ceiling.md and ceiling.png.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # of trainer and study

from trainer import objectives, options, report, stop, training
from trainer.evaluate import recall_at_k
from trainer.flags import Parser, count, positive
from trainer.reach import PAPERS
from trainer.refit import fit, freeze
from trainer.report import Run

from study.summary import BASE, METRIC, Row, draw, table

KINDS = {  # are the base loss and the KL in force, and which images are fitted?
    BASE: (True, False, "train"),
    "base + KL": (True, True, "train"),
    "KL": (False, True, "train"),
    "KL, tested images": (False, True, "test"),
}
JOINTLY = "trained jointly"
STEPS = 500


def measure(args: argparse.Namespace, run: Run, split: Any, sizes: list[int]) -> list[Row]:
    """Recall@1 of every kind of embedder at every size, and of the teachers."""
    images = {"train": split.train, "test": split.test}
    spaces = {part: run.project(images[part], args.workers) for part in images}
    parts = {part: freeze(spaces[part], images[part].labels) for part in images}
    tested = parts["test"]
    settings = report.settings(args, split)
    del settings["seed"]

    def row(method: str, size: int, embeddings: Tensor) -> Row:
        recall = recall_at_k(embeddings, tested.labels, ks=(1,))[METRIC]
        return {"method": method, "size": size, "seed": args.seed, METRIC: recall, **settings}

    rows = []
    for size in sizes:
        for kind, (base, kl, part) in KINDS.items():
            if tested.teacher is None and kl:
                continue
            γ = args.distill_weight if base else 1.0  # alone, Adam does not feel it
            kinds = {"base": base, "distill_weight": γ if kl else 0.0}
            embedder = fit(args, parts[part], size, steps=STEPS, **kinds)
            with torch.no_grad():
                rows.append(row(kind, size, embedder(tested.features)))
        if tested.teacher is not None:
            rows.append(row("heads", size, tested.teacher))
        if size == args.embedding_size:
            rows.append(row(JOINTLY, size, spaces["test"]["embeddings"]))
    return rows


def parser() -> argparse.ArgumentParser:
    """Sizes and seeds; what it does not know goes to train.py."""
    main = Parser(description=__doc__.splitlines()[0], epilog=options.study_help())
    add = main.add_argument
    several: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    add("--sizes", type=positive, **several, default=[8, 16, 32, 64], help="embedding sizes")
    add("--seeds", type=count, **several, default=[0, 1, 2, 3, 4], help="one training each")
    return main


def main(argv: list[str] | None = None) -> None:
    """Train, freeze, fit, write and print."""
    own, rest = parser().parse_known_args(argv)
    rows: list[Row] = []
    for seed in tqdm(own.seeds, desc="seeds", disable=None):
        flags = ["--output", "runs/ceiling", *rest, "--seed", str(seed), "--quiet"]
        args = options.parse(options.parser(), flags)
        if args.teacher:
            parser().error("--teacher brings no heads to copy")
        if args.reach != PAPERS:
            parser().error(f"--reach {args.reach}: the trunk is frozen here")
        if args.threads:
            torch.set_num_threads(args.threads)
        others = {"distill_weight": 0.0, "feature_distill_weight": 0.0, "nmi": False}
        silent = argparse.Namespace(**{**vars(args), **others})
        split, held_out = training.prepare(silent)
        if split.gallery is not None:
            parser().error(f"{args.dataset} has a gallery, which is not searched here")
        args.steps_per_epoch = silent.steps_per_epoch
        which = ("S2SD", objectives.s2sd_loss)
        if args.baseline_only:
            which = ("base", objectives.base_loss)
        trainer = training.Trainer(*which, silent, split, held_out, {}, None)
        run = trainer.train(stop.Request())  # not entered: Ctrl-C ends at once
        rows += measure(args, run, split, own.sizes)
        write(args.output, rows)
    print(table(rows))


def write(folder: Path, rows: list[Row]) -> None:
    """What is known so far."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ceiling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "ceiling.md").write_text(table(rows) + "\n")
    draw(rows, folder / "ceiling.png", paired=False)


if __name__ == "__main__":
    main()
