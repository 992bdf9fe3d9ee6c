"""Pictures of a comparison: its curves over training, and queries with their neighbours.

All are narrow, with large type, so that a phone shows them readable. What differs in colour differs
in the style of lines, markers or signs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from .evaluate import nearest
from .images import Images, Split
from .report import COMPONENTS, Run
from .tables import BASE, S2SD, VALIDATION, Rows, best_epoch, curve, looked_at

matplotlib.use("Agg")  # draws to files, with or without a screen

import matplotlib.pyplot as plt

WIDTH = 5.2  # inches: on a phone of 360 pixels, type of 11 points is 11 pixels high
STYLES: dict[str, dict[str, Any]] = {
    BASE: {"color": "#595959", "ls": "--", "marker": "s"},
    S2SD: {"color": "#1f77b4", "ls": "-", "marker": "o"},
}
OTHERS = ("#d95f02", "#1b7837", "#7b3294", "#8c510a", "#c51b7d")
MARKERS = "^vDPX<>hso"
RIGHT, WRONG, QUERY = "#1b7837", "#c51b1b", "#333333"


def style_of(name: str, place: int) -> dict[str, Any]:
    """Colour, line and marker of a run, or of another series by its place."""
    other = {"color": OTHERS[place % len(OTHERS)], "ls": ":", "marker": MARKERS[place % 10]}
    return {"ms": 5, **STYLES.get(name, other)}


def make(rows: int = 1, columns: int = 1, height: float = 3.6) -> tuple[plt.Figure, np.ndarray]:
    """A figure and its axes (rows, columns)."""
    plt.rcParams.update({"font.size": 11, "legend.fontsize": 10})
    size = (WIDTH, height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def tidy(axes: plt.Axes, **legend: Any) -> None:
    """A light grid, no frame, and a legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, **legend)


def save(figure: plt.Figure, path: Path) -> None:
    """Write and forget a figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)


def names(rows: Rows) -> list[str]:
    """The runs there are."""
    return [name for name in STYLES if any(row[0] == name for row in rows)]


def mean_curve(seeds: Sequence[Rows], who: str, metric: str) -> tuple[list[int], np.ndarray]:
    """Epochs, and the values (seeds, epochs)."""
    found = [curve(rows, who, metric) for rows in seeds]
    return found[0][0], np.array([values for _, values in found])


def recall(seeds: Sequence[Rows], path: Path) -> None:
    """Recall@1 after every epoch: the mean of the seeds, each of them thinly, the best epochs."""
    metric = looked_at(seeds[0])
    figure, ((axes,),) = make()
    for name in names(seeds[0]):
        epochs, values = mean_curve(seeds, name, metric)
        style, values = style_of(name, 0), 100 * values
        for own, rows in zip(values, seeds, strict=True):
            best = best_epoch(rows, name)
            if len(seeds) > 1:
                axes.plot(epochs, own, color=style["color"], linewidth=0.7, alpha=0.5)
            axes.plot(best, own[epochs.index(best)], "*", color=style["color"], ms=13, zorder=3)
        mean = values.mean(axis=0)
        axes.plot(epochs, mean, **{**style, "ms": 3}, label=f"{name} ({mean[-1]:.1f} at the end)")
    where = "held-out training classes" if metric == VALIDATION else "test classes"
    axes.set(xlabel="epoch (★: the best)", ylabel=f"Recall@1 on {where} (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes, loc="lower right")
    save(figure, path)


def losses(seeds: Sequence[Rows], path: Path) -> None:
    """The losses, and the terms of S2SD before they are weighted, means of every epoch."""
    figure, grid = make(rows=2, height=6.4)
    kl = [c for c in COMPONENTS if "distill" in c]
    shown = {name: [(name, "loss", name)] for name in names(seeds[0])}
    terms = [(S2SD, c, f"S2SD: {c}") for c in COMPONENTS if c not in kl]
    above = [*(line for lines in shown.values() for line in lines), *terms]
    below = [(S2SD, c, c.replace("_", " ")) for c in kl]
    for axes, lines, label in zip(
        grid[:, 0], (above, below), ("loss", "KL divergence, unweighted"), strict=True
    ):
        for place, (who, metric, text) in enumerate(lines):
            epochs, values = mean_curve(seeds, who, metric)
            if len(epochs):
                style = style_of(text, place)
                axes.plot(epochs, values.mean(axis=0), **{**style, "ms": 3}, label=text)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            tidy(axes)
        else:
            axes.remove()  # the base loss alone has no such terms
    save(figure, path)


def retrieval(
    runs: Sequence[Run], split: Split, path: Path, seed: int, queries: int = 6, neighbours: int = 7
) -> None:
    """Random queries, and a row of nearest neighbours for every run.

    Seven neighbours, as a class of icons-400 has eight images: all of them can be right.
    """
    generator = torch.Generator().manual_seed(seed)
    test, searched = split.test, split.gallery or split.test
    chosen = torch.randperm(len(test), generator=generator)[:queries].tolist()
    neighbours = min(neighbours, len(searched) - 1)
    found = []
    for run in runs:
        gallery = run.gallery(split, "embeddings")
        embeddings = run.spaces["test"]["embeddings"]
        found.append(nearest(embeddings, neighbours, gallery[0] if gallery else None).cpu())

    rows = len(chosen) * len(runs)
    plt.rcParams.update({"font.size": 9})
    figure, grid = plt.subplots(
        rows,
        neighbours + 1,
        figsize=(0.95 * (neighbours + 1), 1.2 * rows + 0.3),
        layout="constrained",
        squeeze=False,
    )

    def draw(axes: plt.Axes, index: int, images: Images, color: str, sign: str) -> None:
        axes.axis("on")
        axes.imshow(images.picture(index), vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        name = images.names[images.labels[index]]
        name = name if len(name) <= 12 else f"{name[:11]}…"
        axes.set_title(f"{sign} {name}".strip(), fontsize=8, pad=3, color=color, parse_math=False)
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2, linestyle="--" if sign == "✗" else "-")

    for axes in grid.flat:
        axes.axis("off")
    for row, (query, block) in enumerate((q, b) for q in chosen for b in range(len(runs))):
        if block == 0:
            draw(grid[row, 0], query, test, QUERY, "")
        grid[row, 0].text(
            -0.12, 0.5, runs[block].name, transform=grid[row, 0].transAxes, rotation=90,
            ha="right", va="center",
        )  # fmt: skip
        for rank, index in enumerate(found[block][query].tolist()):
            right = bool(searched.labels[index] == test.labels[query])
            marks = (RIGHT, "✓") if right else (WRONG, "✗")
            draw(grid[row, 1 + rank], index, searched, *marks)
    save(figure, path)
