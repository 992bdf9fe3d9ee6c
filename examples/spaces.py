"""Pictures of embedding spaces: similarities, spectra, recall by dimension, a map of classes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from evaluate import apply, recall_at_k
from icons import Icons
from report import Run
from sklearn.manifold import TSNE
from torch import Tensor

from s2sd_pml import S2SDLoss

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLORS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
Spaces = dict[str, Tensor]  # name -> L2-normalised embeddings (N, d)


def draw(runs: list[Run], seen: Icons, unseen: Icons, folder: Path, seed: int) -> None:
    """All of this module's pictures, of trained runs."""
    found = spaces(runs, unseen)
    similarity(found, unseen, folder / "similarity.png")
    spectrum(found, folder / "spectrum.png")
    dimension(runs, found, seen, unseen, folder / "dimension.png")
    projection(runs, found, unseen, folder / "projection.png", seed)


def spaces(runs: list[Run], data: Icons) -> Spaces:
    """The embeddings of every run, then those of the heads, largest first."""
    found = {run.name: F.normalize(apply(run.model, data.images), dim=1).cpu() for run in runs}
    for run in runs:
        if isinstance(run.loss_func, S2SDLoss) and run.loss_func.head_dims:
            with torch.no_grad():
                heads = run.loss_func.project(apply(run.model.trunk, data.images))
            for dim in sorted(heads, reverse=True):
                found[f"head {dim}"] = heads[dim].cpu()
    return found


def rho(embeddings: Tensor) -> float:
    """ρ = KL(uniform ‖ spectrum) of the normalised singular values: 0 if all directions are used.

    Source: Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep
    Metric Learning", ICML 2020 (arXiv 2002.08473).
    """
    values = torch.linalg.svdvals(embeddings.double())
    spectrum = (values / values.sum()).clamp_min(1e-12)
    uniform = torch.full_like(spectrum, 1 / len(spectrum))
    return float((uniform * (uniform / spectrum).log()).sum())


def similarity(found: Spaces, data: Icons, path: Path, classes: int = 10) -> None:
    """Cosine similarities of the same images in each space, ordered by class."""
    rows = (data.labels.cpu() < classes).nonzero().squeeze(1)
    rows = rows[data.labels.cpu()[rows].argsort(stable=True)]
    labels = data.labels.cpu()[rows]
    shown = list(found.items())[:3]  # base, S2SD and its largest teacher
    figure, grid = plt.subplots(
        1, len(shown), figsize=(3.6 * len(shown) + 0.8, 3.9), layout="constrained", squeeze=False
    )
    edges = np.flatnonzero(np.diff(labels.numpy())) + 0.5
    for axes, (name, z) in zip(grid[0], shown, strict=True):
        drawn = axes.imshow(z[rows] @ z[rows].T, vmin=-1, vmax=1, cmap="RdBu_r")
        for edge in edges:
            axes.axhline(edge, color="black", linewidth=0.3)
            axes.axvline(edge, color="black", linewidth=0.3)
        axes.set(title=f"{name} ({z.shape[1]} dimensions)", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=grid, shrink=0.8, label="cosine similarity")
    _save(figure, path)


def spectrum(found: Spaces, path: Path) -> None:
    """Singular values of each space, largest first, as shares of their sum."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for (name, z), color in zip(found.items(), COLORS, strict=False):
        values = torch.linalg.svdvals(z.double())
        x = (torch.arange(len(values)) + 1) / len(values)
        label = f"{name}: ρ = {rho(z):.2f}"
        axes.plot(x, values / values.sum() * len(values), ".-", color=color, ms=3, label=label)
    axes.set(
        xlabel="place of the singular value, as a share of the dimensions",
        ylabel="singular value over their mean",
        yscale="log",
    )
    axes.set_ylim(bottom=1e-4)  # what is below is not used
    _tidy(axes, "lower left")
    _save(figure, path)


def dimension(runs: list[Run], found: Spaces, seen: Icons, unseen: Icons, path: Path) -> None:
    """Recall@1 against dimension: the spaces, and the trunk's features cut down by PCA."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    labels = unseen.labels.cpu()
    for run, color in zip(runs, COLORS, strict=False):
        fitted, tested = (
            apply(run.model.trunk, part.images).mean(dim=(2, 3)).cpu() for part in (seen, unseen)
        )
        width = fitted.shape[1]
        sizes = [2**k for k in range(2, width.bit_length()) if 2**k < width] + [width]
        mean = fitted.mean(dim=0)
        directions = torch.linalg.svd(fitted - mean, full_matrices=False)[2]
        recalls = [_recall((tested - mean) @ directions[:size].T, labels) for size in sizes]
        label = f"features of {run.name}, PCA"
        axes.plot(sizes, recalls, ".--", color=color, alpha=0.6, label=label)
    for (name, z), color in zip(found.items(), COLORS, strict=False):
        marker = "o" if name in [run.name for run in runs] else "^"
        axes.plot(z.shape[1], _recall(z, labels), marker, color=color, ms=9, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="dimensions", ylabel="Recall@1 on unseen classes (%)")
    _tidy(axes, "lower right")
    _save(figure, path)


def projection(
    runs: list[Run], found: Spaces, data: Icons, path: Path, seed: int, classes: int = 60
) -> None:
    """Images of random classes by t-SNE, those of ten in colour."""
    labels = data.labels.cpu().numpy()
    chosen = np.random.RandomState(seed).permutation(labels.max() + 1)[:classes]
    rows = np.isin(labels, chosen)
    figure, grid = plt.subplots(
        1, len(runs), figsize=(5 * len(runs), 5.2), layout="constrained", squeeze=False
    )
    for axes, run in zip(grid[0], runs, strict=True):
        tsne = TSNE(metric="cosine", init="random", random_state=seed, perplexity=15)
        points = tsne.fit_transform(found[run.name].numpy()[rows])
        axes.scatter(*points.T, s=3, color="#cccccc")
        for label in chosen[:10]:
            own = points[labels[rows] == label]
            axes.scatter(*own.T, s=22, edgecolors="white", linewidths=0.5, label=data.names[label])
        axes.set(title=run.name, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=5, loc="outside lower center", frameon=False, fontsize=8)
    _save(figure, path)


def _recall(embeddings: Tensor, labels: Tensor) -> float:
    return 100 * recall_at_k(embeddings, labels, ks=(1,))["Recall@1"]


def _tidy(axes: plt.Axes, legend: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc=legend, fontsize=8)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
