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
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from scipy.stats import t as student_t
from tqdm import tqdm

from s2sd_pml import S2SDLoss

sys.path.insert(0, str(Path(__file__).parents[1]))  # of trainer and study

import train
from trainer import options
from trainer.report import REFIT

matplotlib.use("Agg")

import matplotlib.pyplot as plt

BASE = "base"
LARGE = 512  # dimensions of what is cut down by PCA, and of the teacher of two stages
CUTS = "4 8 16 32 64 128 256"


class Method(NamedTuple):
    """Flags of train.py for an embedding size, and which row of its metrics counts."""

    flags: str
    row: str = "S2SD"
    sized: bool = True  # False: one training serves all sizes, up to the largest
    largest: int = LARGE
    teacher: str = ""  # the flags of what must be trained before


RECIPE = S2SDLoss.recipe("small-data")
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
# where heads teach the new embedder alone
KL = f"--refit-weight {RECIPE['distill_weight']} {SOFTMAX}"
HEADS = "--s2sd-only --variant msd --feature-distill-weight 0 --distill-weight 0 {kl}"
PREFIXES = "--embedding-size 128 --matryoshka-dims 16 32 64"
BIG = f"--baseline-only --embedding-size {LARGE} --cut {CUTS}"
METHODS = {
    BASE: Method("--baseline-only", "base"),
    "heads, no KL": Method(HEADS),
    "DSD": Method("--s2sd-only --variant dsd --feature-distill-weight 0"),
    "MSD": Method("--s2sd-only --variant msd --feature-distill-weight 0"),
    "MSDF": Method("--s2sd-only --variant msdf"),
    "MSDFA": Method("--s2sd-only --variant msdfa"),
    "MSDF, small-data": Method(MSDF),
    "MSDFA, small-data": Method(MSDFA),
    "base, twice the steps": Method("--baseline-only --epochs {twice}", "base"),
    f"base, {REFIT}": Method("--baseline-only", f"base, {REFIT}"),
    f"MSDF, {REFIT}": Method("--s2sd-only --variant msdf", f"S2SD, {REFIT}"),
    f"heads, {REFIT}": Method(HEADS, f"S2SD, {REFIT}"),
    f"MSDF, small-data, {REFIT}": Method(MSDF, f"S2SD, {REFIT}"),
    f"MSDFA, small-data, {REFIT}": Method(MSDFA, f"S2SD, {REFIT}"),
    f"base {LARGE} + PCA": Method(BIG, "PCA {size}", sized=False),
    "Matryoshka": Method(
        f"--baseline-only {PREFIXES}", "base, first {size}", sized=False, largest=128
    ),
    "MSDF, Matryoshka": Method(
        f"--s2sd-only --variant msdf {PREFIXES}", "S2SD, first {size}", sized=False, largest=128
    ),
    "MSDF, small-data, Matryoshka": Method(
        f"{MSDF} {PREFIXES}", "S2SD, first {size}", sized=False, largest=128
    ),
    "MSDF and lite2": Method("--s2sd-only --variant msdf --teacher lite2"),
    "lite2": Method("--s2sd-only --teacher lite2 --dims --feature-distill-weight 0"),
    "two stages": Method("--s2sd-only --dims --feature-distill-weight 0", teacher=BIG),
}
METRIC = "Recall@1"
STOPPED = 130  # the exit status after Ctrl-C
Row = dict[str, Any]


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
        raise SystemExit(f"{others[0]!r} has no refitted embedder: run it without --refit")
    common = [*rest, *(["--validation"] if args.validation else [])]
    (args.output / "cells").mkdir(parents=True, exist_ok=True)

    def cell(flags: str, size: int | None, seed: int, teacher: Path | None = None) -> Cell:
        sized = [] if size is None else ["--embedding-size", str(size)]
        every = [*common, *flags.format(**filled).split(), *sized, "--seed", str(seed)]
        key = hashlib.sha256(json.dumps([*every, bool(teacher)]).encode()).hexdigest()[:12]
        return Cell(every, args.output / "cells" / f"{key}.json", teacher)

    entries = []
    for size, seed in product(args.sizes, args.seeds):
        for name, method in methods.items():
            if not method.sized and size > method.largest:
                continue
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
        tqdm(total=len(cells), initial=len(cells) - len(missing), desc="cells") as bar,
    ):
        for wave in (False, True):
            now = [cell for cell in missing if bool(cell.teacher) == wave]
            try:
                for done in as_completed([pool.submit(run_cell, cell) for cell in now]):
                    done.result()
                    bar.update()
            except (KeyboardInterrupt, SystemExit) as error:
                pool.shutdown(cancel_futures=True)
                code = getattr(error, "code", STOPPED)
                if code == STOPPED:  # here, or first in a cell
                    print("\nStopped. The same command goes on.", file=sys.stderr)
                sys.exit(code)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval (Student's t); NaN for one value."""
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    half = student_t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(half)


def values(rows: list[Row], method: str, size: int) -> dict[int, float]:
    """The metric in per cent by seed."""
    return {r["seed"]: 100 * r[METRIC] for r in rows if (r["method"], r["size"]) == (method, size)}


def differences(rows: list[Row], method: str, size: int) -> list[float]:
    """Method minus base at the same seed."""
    own, base = values(rows, method, size), values(rows, BASE, size)
    return [own[seed] - base[seed] for seed in own if seed in base]


def table(rows: list[Row]) -> str:
    """Mean, and in brackets the paired difference to the base loss with its 95% interval."""
    methods, sizes = names(rows)
    lines = ["| method | " + " | ".join(map(str, sizes)) + " |", "| --- |" + " ---: |" * len(sizes)]
    for method in methods:
        cells = []
        for size in sizes:
            found = values(rows, method, size)
            if not found:
                cells.append("")  # such as Matryoshka beyond its dimensions
                continue
            mean, _ = interval(found.values())
            paired = differences(rows, method, size) if method != BASE else []
            shift, half = interval(paired) if paired else (0, 0)
            bound = f" ± {half:.1f}" if len(paired) > 1 else ""  # one seed has none
            cells.append(f"{mean:.1f}" + (f" ({shift:+.1f}{bound})" if paired else ""))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def names(rows: list[Row]) -> tuple[list[str], list[int]]:
    """The methods in the order of the grid, and the sizes."""
    return list(dict.fromkeys(r["method"] for r in rows)), sorted({r["size"] for r in rows})


def draw_differences(rows: list[Row], path: Path) -> None:
    """What every method gains: against embedding size, or in rows if there is one size."""
    methods, sizes = names(rows)
    if len(sizes) > 1:
        return draw(rows, path, paired=True)
    shown = [method for method in reversed(methods) if method != BASE]
    means, halves = zip(*(interval(differences(rows, m, sizes[0])) for m in shown), strict=True)
    height = 1.1 + 0.28 * len(shown)
    figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
    axes.errorbar(means, shown, xerr=np.nan_to_num(halves), fmt="o", ms=4, capsize=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"{METRIC} minus base, points\n(unseen classes, {sizes[0]} dimensions)")
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(rows: list[Row], path: Path, paired: bool) -> None:
    """The metric, or its paired difference to the base loss, against embedding size."""
    methods, sizes = names(rows)
    figure, axes = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    for place, method in enumerate(methods):
        if paired and method == BASE:
            continue
        of = differences if paired else (lambda *a: list(values(*a).values()))
        known = [s for s in sizes if of(rows, method, s)]
        means, halves = zip(*(interval(of(rows, method, s)) for s in known), strict=True)
        x = [s * 1.03 ** (place - len(methods) / 2) for s in known]  # side by side
        axes.errorbar(x, means, np.nan_to_num(halves), fmt=".-", capsize=2, label=method)
    if paired:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    kind = "minus base, points" if paired else "(%)"
    axes.set(xlabel="embedding size", ylabel=f"{METRIC} on unseen classes {kind}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """What to compare; what it does not know goes to train.py."""
    main = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other flags are those of train.py.",
        allow_abbrev=False,  # --seed is not --seeds
    )
    add = main.add_argument
    add("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    usual = [name for name in METHODS if REFIT not in name]
    add("--methods", nargs="*", choices=METHODS, default=usual, metavar="NAME")
    add(
        "--method",
        action="append",
        default=[],
        metavar="'NAME: FLAGS'",
        help="one of your own; 'NAME, refit: FLAGS' for its embedder fitted anew",
    )
    add("--validation", action="store_true", help="evaluate on held-out training classes")
    add("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time")
    add("--output", type=Path, default=Path("runs/compare"))
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
