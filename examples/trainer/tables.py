"""The table of a comparison, from the rows of metrics.csv of one seed or several."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

BASE, S2SD = "base", "S2SD"
COLUMNS = ("run", "epoch", "step", "metric", "value", "seconds")
FIRST = "first "  # dimensions of a run's embeddings
REFIT = "refitted embedder"  # the space of an embedder fitted to the frozen features
VALIDATION = "validation Recall@1"  # on held-out training classes, after an epoch
Row = tuple[str, int, int, str, float, float]  # as in COLUMNS
Rows = Sequence[Row]  # of one seed


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval (Student's t); NaN for one value."""
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    half = student_t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(half)


def read(path: Path) -> list[Row]:
    """The rows of a metrics.csv."""
    with open(path, newline="") as file:
        return [
            (r["run"], int(r["epoch"]), int(r["step"]), r["metric"], float(r["value"]),
             float(r["seconds"])) for r in csv.DictReader(file)
        ]  # fmt: skip


def scores(rows: Rows) -> dict[str, dict[str, float]]:
    """The final metrics of every run and head; the last row of each counts."""
    found: dict[str, dict[str, float]] = {}
    for who, _, _, metric, value, _ in rows:
        if ("@" in metric or metric == "NMI") and metric != VALIDATION:
            found.setdefault(who, {})[metric] = value
    complete = {who for who, values in found.items() if "MAP@R" in values}
    return {who: values for who, values in found.items() if who in complete}


def curve(rows: Rows, who: str, metric: str) -> tuple[list[int], list[float]]:
    """Epochs and values of a metric of a run."""
    found = {epoch: value for run, epoch, _, m, value, _ in rows if (run, m) == (who, metric)}
    return list(found), list(found.values())


def looked_at(rows: Rows) -> str:
    """The metric that is followed over training: on held-out classes with --choose-epoch."""
    return VALIDATION if any(row[3] == VALIDATION for row in rows) else "Recall@1"


def best_epoch(rows: Rows, who: str) -> int:
    """The first epoch with the highest Recall@1; 0 for what has no curve, such as a head."""
    epochs, values = curve(rows, who, looked_at(rows))
    return epochs[int(np.argmax(values))] if who in (BASE, S2SD) and epochs else 0


def table(seeds: Sequence[Rows]) -> str:
    """Metrics in %: base, S2SD, their difference, and every head; over seeds their means.

    The difference is that of the cells as they are printed. Over several seeds it has the 95%
    interval of the differences that are paired by seed.
    """
    found = [scores(rows) for rows in seeds]
    columns = [name for name in found[0] if FIRST not in name]
    if {BASE, S2SD} <= set(columns):
        columns.insert(columns.index(S2SD) + 1, "difference")
    main = next(name for name in (BASE, S2SD) if name in found[0])
    lines = [["", *columns]]
    for metric in found[0][main]:
        lines.append([metric, *_cells([_percent(of, metric) for of in found], columns)])
    for size in sorted({int(name.split()[-1]) for name in found[0] if FIRST in name}):
        names = {who: f"{who}, {FIRST}{size}" for who in (BASE, S2SD)}
        values = [
            {who: 100 * of[name]["Recall@1"] for who, name in names.items() if name in of}
            for of in found
        ]
        lines.append([f"Recall@1, {FIRST}{size}", *_cells(values, columns)])
    seconds = [{row[0]: row[5] for row in rows if row[0] in (BASE, S2SD) or REFIT in row[0]}
               for rows in seeds]  # fmt: skip
    lines.append(["training time", *_cells(seconds, columns, " s")])
    kind = "chosen epoch" if looked_at(seeds[0]) == VALIDATION else "best epoch"
    epochs = {who: [best_epoch(rows, who) for rows in seeds] for who in columns}
    lines.append([kind, *(", ".join(str(e) for e in epochs[who] if e) for who in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in lines
    )


def _percent(found: dict[str, dict[str, float]], metric: str) -> dict[str, float]:
    return {name: 100 * values[metric] for name, values in found.items() if metric in values}


def _cells(seeds: list[dict[str, float]], columns: list[str], unit: str = "") -> list[str]:
    known = {name for name in seeds[0] if all(name in values for values in seeds)}
    means = {name: round(interval(v[name] for v in seeds)[0], 1) for name in known}
    cells = {name: f"{value:.1f}{unit}" for name, value in means.items()}
    if {BASE, S2SD} <= known:
        cells["difference"] = f"{means[S2SD] - means[BASE]:+.1f}{unit}"
        if len(seeds) > 1:
            _, half = interval(v[S2SD] - v[BASE] for v in seeds)
            cells["difference"] += f" ± {half:.1f}{unit}"
    return [cells.get(name, "") for name in columns]
