"""The two pictures: recall over training, and queries with their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

from .evaluate import nearest
from .images import Images, Split
from .report import Run

matplotlib.use("Agg")  # draws to files, with or without a screen

import matplotlib.pyplot as plt

BASE, S2SD = "#7f7f7f", "#1f77b4"
RIGHT, WRONG, QUERY = "#2ca02c", "#d62728", "#333333"


def recall(runs: Sequence[Run], path: Path) -> None:
    """Recall@1 on unseen classes after every epoch, one curve a run.

    With --choose-epoch it is that on held-out training classes, the chosen epoch marked.
    """
    metric = next(
        (m for _, _, _, m, *_ in runs[0].history if m.startswith("validation")), "Recall@1"
    )
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for run, color in zip(runs, (BASE, S2SD), strict=False):
        epochs, values = run.curve(metric)
        percent = [100 * value for value in values]
        shown = run.chosen - 1 if run.chosen else -1
        axes.plot(epochs, percent, ".-", color=color, label=f"{run.name} ({percent[shown]:.1f})")
        if run.chosen:
            axes.plot(epochs[shown], percent[shown], "o", color=color, ms=9)
    axes.set(
        xlabel="epoch",
        ylabel=f"{metric} on test classes (%)" if metric == "Recall@1" else f"{metric} (%)",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def retrieval(
    runs: Sequence[Run], split: Split, path: Path, seed: int, queries: int = 8, neighbours: int = 7
) -> None:
    """Random queries with their nearest neighbours in every run: right ones green, wrong ones red.

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

    gap = [0.35]
    widths = [1, *(len(runs) * (gap + [1] * neighbours))]
    figure, grid = plt.subplots(
        queries,
        len(widths),
        figsize=(0.62 * sum(widths) + 0.2, 0.8 * queries + 0.5),
        gridspec_kw={"width_ratios": widths, "wspace": 0.12, "hspace": 0.3},
        squeeze=False,
    )
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.93)
    for axes in grid.flat:
        axes.axis("off")

    def draw(row: int, column: int, index: int, images: Images, color: str) -> None:
        axes = grid[row, column]
        axes.axis("on")
        axes.imshow(images.picture(index), vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(
            images.names[images.labels[index]][:14], fontsize=5.5, pad=2, parse_math=False
        )
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=1.8)

    for row, query in enumerate(chosen):
        draw(row, 0, query, test, QUERY)
        for block, neighbour_indices in enumerate(found):
            for rank, index in enumerate(neighbour_indices[query].tolist()):
                color = RIGHT if searched.labels[index] == test.labels[query] else WRONG
                draw(row, 2 + block * (neighbours + 1) + rank, index, searched, color)

    headings = [("query", 0, 0)]
    for block, run in enumerate(runs):
        first = 2 + block * (neighbours + 1)
        headings.append((f"{run.name}: nearest neighbours", first, first + neighbours - 1))
    for text, first, last in headings:
        left, right = grid[0, first].get_position().x0, grid[0, last].get_position().x1
        figure.text((left + right) / 2, 0.985, text, ha="center", va="top", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
