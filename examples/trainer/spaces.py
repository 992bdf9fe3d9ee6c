"""Pictures of embedding spaces: similarities, spectra, recall by dimension, a map of classes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from .baselines import principal
from .evaluate import recall_at_k
from .images import Images, Split
from .report import Run

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLORS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
Spaces = dict[str, Tensor]  # name -> L2-normalised embeddings (N, d)


def draw(runs: list[Run], split: Split, folder: Path, seed: int, workers: int = 0) -> None:
    """All of this module's pictures, of runs that have their scores."""
    found = spaces(runs, "test")
    similarity(found, split.test, folder / "similarity.png")
    spectrum(found, folder / "spectrum.png")
    dimension(runs, found, split, folder / "dimension.png", workers)
    projection(runs, found, split.test, folder / "projection.png", seed)


def spaces(runs: list[Run], part: str) -> Spaces:
    """The embeddings of every run, then those of the heads, largest first."""
    found = {run.name: run.spaces[part]["embeddings"] for run in runs}
    for run in runs:
        heads = {name: z for name, z in run.spaces[part].items() if name.startswith("head ")}
        found |= dict(sorted(heads.items(), key=lambda item: -item[1].shape[1]))
    return {name: F.normalize(z, dim=1).cpu() for name, z in found.items()}


def rho(embeddings: Tensor, values: Tensor | None = None) -> float:
    """ρ = KL(uniform ‖ spectrum) of the normalised singular values: 0 if all directions are used.

    Source: Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep
    Metric Learning", ICML 2020 (arXiv 2002.08473).
    """
    values = torch.linalg.svdvals(embeddings.double()) if values is None else values
    spectrum = (values / values.sum()).clamp_min(1e-12)
    uniform = torch.full_like(spectrum, 1 / len(spectrum))
    return float((uniform * (uniform / spectrum).log()).sum())


def similarity(found: Spaces, data: Images, path: Path, classes: int = 10) -> None:
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
        x = (torch.arange(len(values)) + 1) / z.shape[1]
        label = f"{name}: ρ = {rho(z, values):.2f}"
        axes.plot(x, values / values.sum() * len(values), ".-", color=color, ms=3, label=label)
    axes.set(
        xlabel="place of the singular value, as a share of the dimensions",
        ylabel="singular value over their mean",
        yscale="log",
    )
    axes.set_ylim(bottom=1e-4)  # what is below is not used
    _tidy(axes, "lower left")
    _save(figure, path)


def dimension(runs: list[Run], found: Spaces, split: Split, path: Path, workers: int) -> None:
    """Recall@1 against dimension: the spaces, and the trunk's features cut down by PCA."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    labels = split.test.labels
    searched = None if split.gallery is None else spaces(runs, "gallery")

    def recall(z: Tensor, gallery: Tensor | None) -> float:
        pair = None if gallery is None else (gallery, split.gallery.labels)
        return 100 * recall_at_k(z, labels, ks=(1,), gallery=pair)["Recall@1"]

    for run, color in zip(runs, COLORS, strict=False):
        fitted = run.project(split.train, workers)["features"].cpu()
        tested = run.spaces["test"]["features"].cpu()
        theirs = run.spaces["gallery"]["features"].cpu() if searched else None
        width = fitted.shape[1]
        sizes = [2**k for k in range(2, width.bit_length()) if 2**k < width] + [width]
        mean, directions = principal(fitted)
        tested = (tested - mean) @ directions
        theirs = (theirs - mean) @ directions if searched else None
        recalls = [recall(tested[:, :d], theirs[:, :d] if searched else None) for d in sizes]
        label = f"features of {run.name}, PCA"
        axes.plot(sizes, recalls, ".--", color=color, alpha=0.6, label=label)
    for (name, z), color in zip(found.items(), COLORS, strict=False):
        marker = "o" if name in [run.name for run in runs] else "^"
        value = recall(z, searched and searched[name])
        axes.plot(z.shape[1], value, marker, color=color, ms=9, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="dimensions", ylabel="Recall@1 on test classes (%)")
    _tidy(axes, "lower right")
    _save(figure, path)


def projection(
    runs: list[Run], found: Spaces, data: Images, path: Path, seed: int, classes: int = 60
) -> None:
    """Images of random classes by t-SNE, those of ten in colour."""
    labels = data.labels.cpu().numpy()
    chosen = np.random.RandomState(seed).permutation(labels.max() + 1)[:classes]
    rows = np.isin(labels, chosen)
    figure, grid = plt.subplots(
        1, len(runs), figsize=(5 * len(runs), 5.2), layout="constrained", squeeze=False
    )
    for axes, run in zip(grid[0], runs, strict=True):
        nearby = min(15, rows.sum() / 4)
        tsne = TSNE(metric="cosine", init="random", random_state=seed, perplexity=nearby)
        points = tsne.fit_transform(found[run.name].numpy()[rows])
        axes.scatter(*points.T, s=3, color="#cccccc")
        for label in chosen[:10]:
            own = points[labels[rows] == label]
            axes.scatter(
                *own.T,
                s=22,
                edgecolors="white",
                linewidths=0.5,
                label=data.names[label].replace("$", r"\$"),
            )
        axes.set(title=run.name, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=5, loc="outside lower center", frameon=False, fontsize=8)
    _save(figure, path)


def _tidy(axes: plt.Axes, legend: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc=legend, fontsize=8)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
