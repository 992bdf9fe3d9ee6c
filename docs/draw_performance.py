"""Draw the pictures of the page "Performance" from the results saved in docs/performance/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
OURS, PLAIN, HEADS, LOSSES = "#00796b", "#9e9e9e", "#4db6ac", "#b2dfdb"


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a result."""
    return json.loads((HERE / "performance" / f"{name}.json").read_text())["rows"]


def duration(ms: float) -> str:
    """A time as people read it."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def step(ax: Axes) -> None:
    """Step time relative to the plain equations, with its parts."""
    found = rows("loss-step")
    for i, row in enumerate(found):
        whole, plain = row["S2SDLoss ms"], row["plain ms"]
        ax.bar(i - 0.2, 1, 0.36, color=PLAIN, label="plain equations" if i == 0 else None)
        ax.bar(i + 0.2, whole / plain, 0.36, color=OURS, label="S2SDLoss" if i == 0 else None)
        ax.text(i - 0.2, 1.02, duration(plain), ha="center", fontsize=8)
        ax.text(i + 0.2, whole / plain + 0.02, duration(whole), ha="center", fontsize=8)
    ax.set_xticks(range(len(found)), [f"batch {row['batch']}" for row in found])
    ax.set_ylabel("time / that of the plain equations")
    ax.set_ylim(0, 1.35)
    ax.set_title("The loss step, forward and backward")
    ax.legend(loc="upper center", ncols=2)


def memory(ax: Axes) -> None:
    """Peak memory of distillation against batch size."""
    found = rows("memory")
    batches = [row["batch"] for row in found]
    for name, label, color in (
        ("plain", "plain equations", PLAIN),
        ("whole", "relation_kl", HEADS),
        ("chunks", "relation_kl, chunk_size=256", OURS),
    ):
        ax.plot(batches, [row[f"{name} MiB"] for row in found], "o-", color=color, label=label)
    ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel="MiB", xticks=batches)
    ax.set_xticks(batches, map(str, batches))
    ax.minorticks_off()
    ax.set_title("Memory that distillation adds, 5 teachers")
    ax.legend()


def share(ax: Axes) -> None:
    """Where the time of a step goes."""
    found = rows("loss-step")
    for i, row in enumerate(found):
        whole = row["S2SDLoss ms"]
        heads, losses = row["heads ms"] / whole, row["branch losses ms"] / whole
        ax.barh(i, heads, color=HEADS, label="heads alone" if i == 0 else None)
        ax.barh(i, losses, left=heads, color=LOSSES, label="PML's losses alone" if i == 0 else None)
    ax.axvline(1, color=OURS, label="S2SDLoss")
    ax.set_yticks(range(len(found)), [f"batch {row['batch']}" for row in found])
    ax.invert_yaxis()
    ax.set_xlabel("time / that of S2SDLoss")
    ax.set_title("Its parts, each measured alone")
    ax.set_xlim(0, 1.75)
    ax.legend(loc="upper right")


def scaling(ax: Axes) -> None:
    """Work of a rank against the number of ranks."""
    found = rows("scaling")
    ranks = [row["ranks"] for row in found]
    work = [row["processor time per rank, ms"] for row in found]
    ax.plot(ranks, work, "o-", color=OURS, label="measured")
    ax.plot(ranks, [work[0] / n for n in ranks], "--", color=PLAIN, label="one rank's / ranks")
    ax.set(xscale="log", yscale="log", xlabel="ranks", ylabel="processor time per rank, ms")
    ax.set_xticks(ranks, map(str, ranks))
    ax.set_yticks(work, [f"{w:.0f}" for w in work])
    ax.minorticks_off()
    ax.set_title("Distillation over ranks, global batch 2048")
    ax.legend()


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for draw, ax in zip((step, share, memory, scaling), axes.flat, strict=True):
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "images" / "performance.png", dpi=110)


if __name__ == "__main__":
    main()
