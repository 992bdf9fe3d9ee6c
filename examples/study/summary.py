"""The rows of a grid as tables and figures: means, and differences that are paired by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from trainer.tables import BASE, interval

METRIC = "Recall@1"
Row = dict[str, Any]


def values(rows: list[Row], method: str, size: int) -> dict[int, float]:
    """The metric in % by seed."""
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
                cells.append("")  # such as Matryoshka above its dimensions
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
