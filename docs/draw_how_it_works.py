"""Draw images/how-it-works.png. Its matrices are real, of a short S2SD training on icons-400.

python docs/draw_how_it_works.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from pytorch_metric_learning import losses, miners
from torch import Tensor

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

import icons  # noqa: E402
from network import Network  # noqa: E402

from s2sd_pml import S2SDLoss  # noqa: E402

KEPT, TRAINING_ONLY, FEATURES, INK = "#1f6f8b", "#d9822b", "#8e44ad", "#222222"
CLASSES, PER_CLASS, SIZE, HEADS = 8, 4, 8, (128, 512)


def similarity_matrices() -> dict[str, Tensor]:
    """Cosine similarities of a batch of unseen classes, in every space, after a short training."""
    torch.manual_seed(0)
    seen, unseen = icons.split(icons.load())
    model = Network(SIZE)
    loss_func = S2SDLoss(
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(),
        embedder=model.embedder,
        head_dims=HEADS,
        weight=5.0,
        feature_weight=5.0,
        feature_delay=0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_func.add_to(optimizer)
    for images, labels in icons.batches(seen, 128, 4, steps=150, seed=0):
        loss = loss_func(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    rows = unseen.labels < CLASSES
    images = unseen.images[rows].view(CLASSES, -1, 1, 32, 32)[:, :PER_CLASS].flatten(0, 1)
    with torch.no_grad():
        features = model.trunk(images).mean(dim=(2, 3))
        spaces = {"φ": features, "ψ": model.embedder(features)}
        spaces |= {f"g{d}": z for d, z in loss_func.project(features).items()}
    unit = {name: torch.nn.functional.normalize(z, dim=1) for name, z in spaces.items()}
    return {name: z @ z.T for name, z in unit.items()}


def box(ax: Axes, x: float, y: float, text: str, colour: str, width: float = 1.5) -> None:
    """A part of the model, centred on (x, y)."""
    corner = (x - width / 2, y - 0.36)
    style = "round,pad=0.02,rounding_size=0.12"
    dashed = "--" if colour == TRAINING_ONLY else "-"
    patch = FancyBboxPatch(
        corner, width, 0.72, boxstyle=style, fc="white", ec=colour, lw=2, ls=dashed
    )
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", fontsize=13, color=INK)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0
) -> None:
    """From one point to another."""
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=16,
        lw=2,
        color=colour,
        connectionstyle=f"arc3,rad={bend}",
        shrinkA=0,
        shrinkB=0,
    )
    ax.add_patch(patch)


def matrix(ax: Axes, x: float, y: float, values: Tensor, title: str, colour: str) -> None:
    """A heat map of side 1.3, centred on (x, y)."""
    half = 0.65
    extent = (x - half, x + half, y - half, y + half)
    ax.imshow(values.numpy(), extent=extent, cmap="magma", vmin=-0.2, vmax=1, zorder=2)
    corner = (x - half, y - half)
    ax.add_patch(plt.Rectangle(corner, 2 * half, 2 * half, fc="none", ec=colour, lw=2.5, zorder=3))
    ax.text(x, y + half + 0.12, title, ha="center", va="bottom", fontsize=12, color=INK)


def draw(path: Path) -> None:
    """The whole picture: one row for every space, embeddings at the bottom."""
    sims = similarity_matrices()
    fig, ax = plt.subplots(figsize=(12.8, 7.0), dpi=130)
    fig.patch.set_facecolor("white")
    top, high, middle, low = 6.0, 4.1, 2.2, 0.3
    split, column = 4.6, 9.9

    box(ax, 0.6, middle, "images", KEPT, 1.3)
    box(ax, 2.4, middle, "trunk", KEPT, 1.3)
    arrow(ax, (1.28, middle), (1.72, middle), KEPT)
    ax.plot([3.08, split], [middle, middle], color=KEPT, lw=2)
    ax.plot([split], [middle], "o", color=KEPT, ms=7)
    ax.text(3.85, middle + 0.14, "features φ", ha="center", fontsize=12.5, color=INK)

    for y, d, name in ((top, HEADS[1], "$g_m$"), (high, HEADS[0], "$g_1$")):
        box(ax, 6.4, y, f"head {name}", TRAINING_ONLY, 1.7)
        arrow(ax, (split, middle), (5.5, y), TRAINING_ONLY)
        arrow(ax, (7.28, y), (column - 0.7, y), TRAINING_ONLY)
        ax.text(8.2, y + 0.13, f"$L_{name[3]}$", ha="center", fontsize=14, color=TRAINING_ONLY)
        matrix(ax, column, y, sims[f"g{d}"], f"cos({name}(φ))", TRAINING_ONLY)
    arrow(ax, (split, middle), (column - 0.7, middle), FEATURES)
    matrix(ax, column, middle, sims["φ"], "cos(φ)", FEATURES)
    box(ax, 6.4, low, "embedder $f$", KEPT, 1.7)
    arrow(ax, (split, middle), (5.5, low), KEPT)
    arrow(ax, (7.28, low), (column - 0.7, low), KEPT)
    ax.text(8.2, low + 0.13, "$L$", ha="center", fontsize=14, color=KEPT)
    ax.text(8.2, low - 0.42, "embeddings ψ", ha="center", fontsize=13, color=INK)
    matrix(ax, column, low, sims["ψ"], "cos(ψ)", KEPT)

    ends = ((top, -0.42, TRAINING_ONLY), (high, -0.38, TRAINING_ONLY), (middle, -0.34, FEATURES))
    for y, bend, colour in ends:
        arrow(ax, (column + 0.72, y), (column + 0.72, low + 0.1), colour, bend)
    ax.text(11.85, 3.2, "$\\gamma$ · KL", va="center", fontsize=15, color=TRAINING_ONLY)
    ax.text(11.1, 0.75, "$\\gamma_f$ · KL", va="center", fontsize=15, color=FEATURES)

    ax.plot([], [], color=KEPT, lw=2.5, label="kept: the deployed model, unchanged")
    ax.plot([], [], color=TRAINING_ONLY, lw=2.5, ls="--", label="training only: heads")
    ax.plot([], [], color=FEATURES, lw=2.5, label="training only: features as a teacher")
    ax.legend(loc="upper left", fontsize=12, frameon=False, bbox_to_anchor=(0.0, 0.98))
    ax.set_xlim(-0.3, 13.0)
    ax.set_ylim(-0.6, 7.1)
    ax.set_aspect("equal")
    ax.axis("off")
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, bbox_inches="tight", pad_inches=0.25)


if __name__ == "__main__":
    draw(DOCS / "images" / "how-it-works.png")
