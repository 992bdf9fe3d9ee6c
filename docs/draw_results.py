"""Draw the figures of the results and of the study from docs/results: python docs/draw_results.py

A method has one colour and one marker in all figures. Backgrounds are transparent, and lines and
letters have a grey that shows on light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tables
from matplotlib.axes import Axes
from tables import difference, rows, summary

IMAGES = Path(__file__).parent / "images"
GREY = "#808080"
COLOURS = {
    "base": (GREY, "o"),
    "MSDF, high-rate": ("#2a8fbd", "o"),
    "MSDF, high-rate, refitted embedder": ("#2a8fbd", "D"),
    "MSDFA, high-rate": ("#e07b39", "s"),
    "MSDF": ("#c8509b", "v"),
    "MSDF, two layers": ("#8d7be0", "^"),
    "MSDFA, two layers": ("#c9a227", "P"),
    "MSDFA, two layers, no KL": ("#a07855", "X"),
    "MSDFA, γ = γ_f = 30": ("#c8509b", "v"),
    "heads, no KL": ("#a07855", "X"),
    "base 512 + PCA": ("#3fa266", "p"),
    "Matryoshka": ("#d9534f", "<"),
    "MSDF, high-rate, Matryoshka": ("#c8509b", ">"),
    "two-stage distillation": ("#c9a227", "h"),
    "base, twice the steps": ("#1fa39a", "*"),
    "S2SD, detached": ("#2a8fbd", "d"),
    "base + KL": ("#2a8fbd", "o"),
    "KL": ("#3fa266", "p"),
    "KL, tested images": ("#d9534f", "v"),
    "heads": ("#8d7be0", "^"),
    "trained jointly": ("#e07b39", "s"),
}
EMOJI = "emoji, EfficientNet-lite0, 320 steps"
ICONS = "icons-400, small network from scratch, 400 steps"


def style() -> None:
    """The grey for all that is not data."""
    names = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color legend.labelcolor"
    plt.rcParams.update(dict.fromkeys(names.split(), GREY))
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "legend.fontsize": 9.5})


def finish(figure: plt.Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.png", dpi=120, transparent=True)
    plt.close(figure)


def open_axes(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def by_size(ax: Axes, found: tables.Rows, methods: Sequence[str], paired: bool) -> None:
    """Mean and 95% interval against embedding size: of the metric, or of method minus base."""
    sizes = sorted({row["size"] for row in found if row["method"] in methods})
    most = len({row["seed"] for row in found})
    for method in methods:
        points = {
            size: difference(found, method, size).points
            if paired
            else list(summary.values(found, method, size).values())
            for size in sizes
        }
        x = [size for size in sizes if len(points[size]) > 1]  # one seed has no interval
        means, halves = zip(*(summary.interval(points[size]) for size in x), strict=True)
        colour, marker = COLOURS[method]
        dashed = method.endswith(tables.REFITTED)
        fewer = max(map(len, points.values()))
        label = f"{method} ({fewer} seeds)" if fewer < most else method
        label = label.replace("high-rate", "recipe high-rate")
        ax.errorbar(
            x, means, [0 if math.isnan(half) else half for half in halves], color=colour,
            marker=marker, ms=6, mfc="none" if dashed else colour, ls="--" if dashed else "-",
            lw=1.6, elinewidth=1, capsize=3, label=label,
        )  # fmt: skip
    if paired:
        ax.axhline(0, color=GREY, lw=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, map(str, sizes))
    ax.set_xlabel("embedding size")
    open_axes(ax)


def curves(name: str, file: str, title: str, methods: Sequence[str], paired: bool = True) -> None:
    """One panel: methods against embedding size."""
    figure, ax = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    found = rows(file)
    shown = {row["method"] for row in found}
    assert len(methods) <= 6, methods
    assert shown >= set(methods), set(methods) - shown
    by_size(ax, found, methods, paired)
    ax.set_ylabel("Recall@1 minus base, points" if paired else "Recall@1, %")
    ax.set_title(f"{title}, {seeds(found)}")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, name)


def seeds(found: tables.Rows) -> str:
    return f"{len({row['seed'] for row in found})} seeds"


def results() -> None:
    """What S2SD gains on each data set with more than one seed."""
    kinds = [
        ("cub", "CUB-200-2011, EfficientNet-lite0", ["MSDF"]),
        ("emoji", "emoji, EfficientNet-lite0", ["MSDF, high-rate"]),
        ("icons-400-from-scratch", "icons-400, from scratch", ["MSDF"]),
    ]
    shown = [(rows(file), title, methods) for file, title, methods in kinds]
    shown = [kind for kind in shown if len({row["seed"] for row in kind[0]}) > 1]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.3 * len(shown), 3.6), layout="constrained", sharey=True
    )
    for ax, (found, title, methods) in zip(axes, shown, strict=True):
        found = [row for row in found if row["size"] >= 16]
        by_size(ax, found, methods, paired=True)
        ax.set_title(f"{title},\n{seeds(found)}")
        ax.legend(frameon=False)
    axes[0].set_ylabel("Recall@1 minus base, points")
    finish(figure, "results")


def rows_of_one_size(name: str, file: str, title: str, size: int) -> None:
    """A row for every method: method minus base with its interval."""
    found = rows(file)
    methods = [m for m in reversed(summary.names(found)[0]) if m != summary.BASE]
    means, halves = zip(
        *(summary.interval(difference(found, m, size).points) for m in methods), strict=True
    )
    figure, ax = plt.subplots(figsize=(7.6, 1.2 + 0.27 * len(methods)), layout="constrained")
    ax.errorbar(means, methods, xerr=halves, fmt="o", ms=5, capsize=2.5, color="#2a8fbd")
    ax.axvline(0, color=GREY, lw=1)
    ax.set_ylim(-0.6, len(methods) - 0.4)
    ax.set_xlabel("Recall@1 minus base, points")
    figure.suptitle(f"{title}, {seeds(found)}", fontsize=11)
    open_axes(ax)
    finish(figure, name)


LINES = {  # of the diagnosis: column, label, colour, dashes
    "base": ("½ base", GREY, "-"),
    "aux": ("½ mean aux", "#3fa266", "--"),
    "distill": ("γ distill", "#2a8fbd", "-."),
    "feature_distill": ("γ_f feature distill", "#e07b39", ":"),
}


def diagnosis(name: str, file: str, weights: str) -> None:
    """Gradients of the weighted terms, and agreement with the teachers, over training."""
    found = tables.diagnosis(file)
    step = [row["step"] for row in found]
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4), layout="constrained")
    for ax, where in zip(axes, ("trunk", "embedder"), strict=False):
        for term, (label, colour, dashes) in LINES.items():
            column = f"{term} on {where}"
            values = [row.get(column, 0.0) for row in found]
            if max(values) > 1e-6:  # else the term does not reach it
                ax.plot(step, values, dashes, color=colour, label=label, lw=1.8)
        ax.set(yscale="log", xlabel="step", title=f"gradient norm on the {where}")
        ax.legend(frameon=False)
    teachers = {"features": ("#e07b39", ":"), "head 256": ("#8d7be0", "-"),
                "head 512": ("#2a8fbd", "--")}  # fmt: skip
    for teacher, (colour, dashes) in teachers.items():
        if f"agreement with {teacher}" in found[0]:
            values = [row[f"agreement with {teacher}"] for row in found]
            axes[2].plot(step, values, dashes, color=colour, label=f"with {teacher}", lw=1.8)
    axes[2].set(xlabel="step", title="correlation of the student's similarities")
    axes[2].legend(frameon=False)
    for ax in axes:
        open_axes(ax)
    figure.suptitle(f"icons-400, small network from scratch, one seed: {weights}", fontsize=12)
    finish(figure, name)


def draw() -> None:
    style()
    results()
    curves("study-emoji", "emoji", EMOJI, [
        "MSDF, high-rate", "MSDF, high-rate, refitted embedder", "base, twice the steps",
        "two-stage distillation", "base 512 + PCA", "Matryoshka",
    ])  # fmt: skip
    curves("beyond-emoji", "emoji", EMOJI, [
        "MSDF, high-rate", "MSDF, high-rate, Matryoshka", "Matryoshka", "base 512 + PCA",
    ])  # fmt: skip
    curves("study-icons-400", "icons-400", ICONS, [
        "MSDF, high-rate", "MSDFA, high-rate", "MSDF", "heads, no KL", "base 512 + PCA",
        "Matryoshka",
    ])  # fmt: skip
    curves("study-msdfa", "icons-400-msdfa", ICONS, [
        "MSDFA, high-rate", "MSDFA, two layers", "MSDFA, γ = γ_f = 30",
        "MSDFA, two layers, no KL", "MSDF, two layers",
    ])  # fmt: skip
    curves("study-proxyanchor", "icons-400-proxyanchor", "icons-400, ProxyAnchorLoss", [
        "base", "base 512 + PCA", "S2SD, detached",
    ], paired=False)  # fmt: skip
    frozen = ["base", "base + KL", "KL", "KL, tested images", "heads", "trained jointly"]
    for data, title in (("emoji", "emoji"), ("icons-400", "icons-400")):
        curves(f"study-frozen-{data}", f"ceiling-{data}", f"{title}, embedders of a frozen trunk",
               frozen, paired=False)  # fmt: skip
    rows_of_one_size(
        "study-settings", "icons-400-settings-validation",
        "icons-400, small network, held-out training classes, 16 dimensions", 16,
    )  # fmt: skip
    diagnosis("study-diagnosis-50", "50", "γ = γ_f = 50, T = 1")
    diagnosis("study-diagnosis-10", "10", "γ = γ_f = 10, T = 1")
    diagnosis("study-diagnosis-soft", "soft", "γ = 20, T = 0.1, no diagonal")


if __name__ == "__main__":
    draw()
