"""Compare methods over embedding sizes and seeds, on classes that none of them has seen.

    python examples/study/compare.py --sizes 8 16 32 --seeds 0 1 2
    python examples/study/compare.py --validation --method "T=0.5: --variant msd --temperature 0.5"
    python examples/study/compare.py --steps-per-epoch 200   # flags of train.py go to every run

A cell of the grid is one run of train.py. Finished cells are kept in ``--output`` and never run
again, so a grid can be stopped at any time and grow later. Written from all of them: results.csv
(a row a cell, with its configuration), recall.png, differences.png and table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from s2sd_pml import S2SDLoss

sys.path.insert(0, str(Path(__file__).parents[1]))  # of trainer and study

import train
from trainer import options
from trainer.flags import Parser
from trainer.tables import REFIT

from study.summary import BASE, Row, draw, draw_differences, names, table

LARGE = 512  # dimensions of what is cut down by PCA, and of the teacher of two-stage distillation
CUTS = "4 8 16 32 64 128 256"


class Method(NamedTuple):
    """Flags of train.py for an embedding size, and which row of its metrics counts."""

    flags: str
    row: str = "S2SD"
    sized: bool = True  # False: one training serves all sizes, up to the largest
    largest: int = LARGE
    teacher: str = ""  # the flags of what must be trained before


RECIPE = S2SDLoss.recipe("high-rate")
SOFTMAX = (
    f"--temperature {RECIPE['temperature']} {'--exclude-self' if RECIPE['exclude_self'] else ''}"
)
SMALL = (
    f"--s2sd-only --variant {{variant}} --dims {' '.join(map(str, RECIPE['head_dims']))} "
    f"--distill-weight {RECIPE['distill_weight']} "
    f"--feature-distill-weight {RECIPE['feature_distill_weight']} "
    f"--feature-distill-delay {RECIPE['feature_distill_delay']} {SOFTMAX} --linear-heads"
)
MSDF, MSDFA = SMALL.format(variant="msdf"), SMALL.format(variant="msdfa")
# where heads teach the refitted embedder alone
KL = f"--refit-weight {RECIPE['distill_weight']} {SOFTMAX}"
HEADS = "--s2sd-only --variant msd --feature-distill-weight 0 --distill-weight 0 {kl}"
TEACHER = f"--teacher lite2 --teacher-weight {RECIPE['distill_weight']}"
PREFIXES = "--embedding-size 128 --matryoshka-dims 16 32 64"
BIG = f"--baseline-only --embedding-size {LARGE} --cut {CUTS}"
METHODS = {
    BASE: Method("--baseline-only", "base"),
    "heads, no KL": Method(HEADS),
    "DSD": Method("--s2sd-only --variant dsd --feature-distill-weight 0"),
    "MSD": Method("--s2sd-only --variant msd --feature-distill-weight 0"),
    "MSDF": Method("--s2sd-only --variant msdf"),
    "MSDFA": Method("--s2sd-only --variant msdfa"),
    "MSDF, high-rate": Method(MSDF),
    "MSDFA, high-rate": Method(MSDFA),
    "base, twice the steps": Method("--baseline-only --epochs {twice}", "base"),
    "MSDF, twice the steps": Method("--s2sd-only --variant msdf --epochs {twice}"),
    "MSDF, high-rate, twice the steps": Method(f"{MSDF} --epochs {{twice}}"),
    f"base, {REFIT}": Method("--baseline-only", f"base, {REFIT}"),
    f"MSDF, {REFIT}": Method("--s2sd-only --variant msdf", f"S2SD, {REFIT}"),
    f"heads, {REFIT}": Method(HEADS, f"S2SD, {REFIT}"),
    f"MSDF, high-rate, {REFIT}": Method(MSDF, f"S2SD, {REFIT}"),
    f"MSDFA, high-rate, {REFIT}": Method(MSDFA, f"S2SD, {REFIT}"),
    f"base {LARGE} + PCA": Method(BIG, "PCA {size}", sized=False),
    "Matryoshka": Method(
        f"--baseline-only {PREFIXES}", "base, first {size}", sized=False, largest=128
    ),
    "MSDF, Matryoshka": Method(
        f"--s2sd-only --variant msdf {PREFIXES}", "S2SD, first {size}", sized=False, largest=128
    ),
    "MSDF, high-rate, Matryoshka": Method(
        f"{MSDF} {PREFIXES}", "S2SD, first {size}", sized=False, largest=128
    ),
    "MSDF and lite2": Method("--s2sd-only --variant msdf --teacher lite2"),
    "lite2": Method("--s2sd-only --teacher lite2 --dims --feature-distill-weight 0"),
    "MSDF and lite2, high-rate": Method(f"{MSDF} {TEACHER}"),
    "lite2, high-rate": Method(
        f"--s2sd-only {TEACHER} {SOFTMAX} --dims --feature-distill-weight 0"
    ),
    "two-stage distillation": Method("--s2sd-only --dims --feature-distill-weight 0", teacher=BIG),
}
STOPPED = 130  # the exit status after Ctrl-C


class Cell(NamedTuple):
    """One training: its flags, the file of its results, and what it must wait for."""

    flags: list[str]
    path: Path
    teacher: Path | None = None

    @property
    def folder(self) -> Path:
        """What train.py writes."""
        return self.path.with_suffix("")

    @property
    def output(self) -> list[str]:
        """The flags that depend on where this is, not on what is trained."""
        flags = ["--quiet", "--no-report", "--output", str(self.folder)]
        if f"--embedding-size {LARGE}" in " ".join(self.flags):
            flags += ["--export", str(self.folder / "model.pt")]
        if self.teacher:
            flags += ["--teacher", str(self.teacher.with_suffix("") / "model.pt")]
        return flags


class Entry(NamedTuple):
    """One row of the results: what it is, and where it is found."""

    method: str
    size: int
    seed: int
    row: str
    cell: Cell


def run_cell(cell: Cell) -> None:
    """Train one cell, from where it was stopped, if it was."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*cell.flags, *cell.output, "--threads", "1", "--resume"])
    keep(cell, time.perf_counter() - start)


def keep(cell: Cell, wall_seconds: float) -> None:
    """Write the results of a trained cell, whole or not at all."""
    config = json.loads((cell.folder / "config.json").read_text())
    del config["command"]  # no number depends on these paths
    if cell.teacher:
        del config["teacher"]
    with open(cell.folder / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    scores: dict[str, dict[str, float]] = {}
    for r in found:  # the last of each counts
        scores.setdefault(r["run"], {})[r["metric"]] = float(r["value"])
    seconds = max(float(r["seconds"]) for r in found)
    if cell.teacher:  # its real cost
        seconds += json.loads(cell.teacher.read_text())["training_seconds"]
    content = {
        "scores": {
            who: {m: x for m, x in v.items() if "@" in m or m == "NMI"} for who, v in scores.items()
        },
        "training_seconds": seconds,
        "wall_seconds": round(wall_seconds, 1),
        **config.pop("versions"),
        **config,
    }
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = cell.path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, cell.path)


def grid(args: argparse.Namespace, rest: list[str]) -> list[Entry]:
    """Every row of the results. A cell's file is named after its flags."""
    known = options.parse(options.parser(), rest)
    filled = {"twice": 2 * known.epochs, "kl": KL if known.refit else ""}
    methods = {name: METHODS[name] for name in args.methods}
    for text in args.method:
        name, colon, flags = text.partition(":")
        if not colon:
            raise SystemExit(f"--method {text!r} is not of the form 'name: flags of train.py'")
        row = f"S2SD, {REFIT}" if name.strip().endswith(f", {REFIT}") else "S2SD"
        methods[name.strip()] = Method(f"--s2sd-only {flags.strip()}", row)
    refitted = [name for name, method in methods.items() if REFIT in method.row]
    if refitted and not known.refit:
        raise SystemExit(f"{refitted[0]!r} needs --refit STEPS, such as --refit 500")
    if others := [name for name in methods if "Matryoshka" in name and known.refit]:
        raise SystemExit(f"{others[0]!r} has no {REFIT}: run it without --refit")
    common = [*rest, *(["--validation"] if args.validation else [])]

    def cell(flags: str, size: int | None, seed: int, teacher: Path | None = None) -> Cell:
        sized = [] if size is None else ["--embedding-size", str(size)]
        every = [*common, *flags.format(**filled).split(), *sized, "--seed", str(seed)]
        key = hashlib.sha256(json.dumps([*every, bool(teacher)]).encode()).hexdigest()[:12]
        return Cell(every, args.output / "cells" / f"{key}.json", teacher)

    entries = []
    for size, seed in product(args.sizes, args.seeds):
        for name, method in methods.items():
            if not method.sized and str(size) not in method.flags.split():
                continue  # none of its sizes
            before = cell(method.teacher, None, seed) if method.teacher else None
            own = cell(
                method.flags, size if method.sized else None, seed, before.path if before else None
            )
            row = method.row.format(size=size)
            if not method.sized and size == method.largest:
                row = "S2SD" if row.startswith("S2SD") else "base"
            if before:
                entries.append(Entry("", LARGE, seed, "base", before))  # to be trained, not shown
            entries.append(Entry(name, size, seed, row, own))
    return entries


def results(entries: list[Entry]) -> list[Row]:
    """The rows of the table, from the files of the cells that are done."""
    rows = []
    for entry in entries:
        if entry.method and entry.cell.path.exists():
            content = json.loads(entry.cell.path.read_text())
            what = {"method": entry.method, "size": entry.size, "seed": entry.seed}
            scores = content.pop("scores")[entry.row]
            rows.append({**what, **scores, **content, "flags": " ".join(entry.cell.flags)})
    return rows


def run(entries: list[Entry], workers: int) -> None:
    """Train what is not there yet, teachers before their students."""
    cells = {entry.cell.path: entry.cell for entry in entries}
    missing = [cell for path, cell in cells.items() if not path.exists()]
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(
            total=len(cells), initial=len(cells) - len(missing), desc="cells", disable=None
        ) as bar,
    ):
        for wave in (False, True):
            now = [cell for cell in missing if bool(cell.teacher) == wave]
            try:
                for done in as_completed([pool.submit(run_cell, cell) for cell in now]):
                    done.result()
                    bar.update()
                    if bar.disable:  # a log file
                        there = sum(map(Path.exists, cells))
                        print(f"{there} of {len(cells)} cells", file=sys.stderr, flush=True)
            except (KeyboardInterrupt, SystemExit) as error:
                pool.shutdown(cancel_futures=True)
                code = getattr(error, "code", STOPPED)
                if code == STOPPED:  # here, or first in a cell
                    print("\nStopped. The same command goes on.", file=sys.stderr)
                sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """What to compare; what it does not know goes to train.py."""
    main = Parser(description=__doc__.splitlines()[0], epilog=options.study_help())
    add = main.add_argument
    several: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    add("--sizes", **several, default=[8, 16, 32, 64], help="embedding sizes")
    add("--seeds", **several, default=[0, 1, 2, 3, 4], help="of every method and size")
    usual = [name for name in METHODS if REFIT not in name]
    listed = f"any of {'; '.join(METHODS)} [all without {REFIT}]"
    add("--methods", nargs="*", choices=METHODS, metavar="NAME", help=listed)
    main.set_defaults(methods=usual)
    add(
        "--method",
        action="append",
        default=[],
        metavar="'NAME: FLAGS'",
        help=f"a custom method; 'NAME, {REFIT}: FLAGS' reports its {REFIT}",
    )
    add("--validation", action="store_true", help="test on held-out training classes")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="cells at a time")
    add("--output", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="of results")
    return main


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, write and print."""
    args, rest = parser().parse_known_args(argv)
    entries = grid(args, rest)
    run(entries, args.workers)
    write(args.output, entries)


def write(output: Path, entries: list[Entry]) -> None:
    """Write what there is, and print the table."""
    rows = results(entries)
    with open(output / "results.csv", "w", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, output / "recall.png", paired=False)
    if BASE in names(rows)[0] and len(names(rows)[0]) > 1:
        draw_differences(rows, output / "differences.png")
    (output / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
