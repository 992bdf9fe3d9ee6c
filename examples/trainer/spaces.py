"""Pictures of embedding spaces: similarities, spectra, recall by dimension, a map of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from .baselines import principal
from .evaluate import recall_at_k
from .images import Images, Split
from .plots import MARKERS, WIDTH, make, save, style_of, tidy
from .report import Run

Spaces = dict[str, Tensor]  # name -> L2-normalised embeddings (N, d)


def draw(runs: list[Run], split: Split, folder: Path, seed: int, workers: int = 0) -> None:
    """All of this module's pictures, of runs that have their scores."""
    found = spaces(runs, "test")
    last = runs[-1]
    features = {f"features of {last.name}": F.normalize(last.spaces["test"]["features"]).cpu()}
    shown = dict(list(found.items())[:3]) | features  # base, S2SD and its largest teacher
    similarity(shown, split.test, folder / "similarity.png")
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


def similarity(shown: Spaces, data: Images, path: Path, classes: int = 10) -> None:
    """Cosine similarities of the same images in each space, ordered by class."""
    labels = data.labels.cpu()
    rows = (labels < classes).nonzero().squeeze(1)
    rows = rows[labels[rows].argsort(stable=True)]
    edges = np.flatnonzero(np.diff(labels[rows].numpy())) + 0.5
    down = -(-len(shown) // 2)
    figure, grid = make(down, 2, height=2.75 * down + 0.6)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes, (name, z) in zip(grid.flat, shown.items(), strict=False):
        drawn = axes.imshow(z[rows] @ z[rows].T, vmin=-1, vmax=1, cmap="RdBu_r")
        for edge in edges:
            axes.axhline(edge, color="black", linewidth=0.3)
            axes.axvline(edge, color="black", linewidth=0.3)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name}\n{z.shape[1]} dimensions", fontsize=11)
    shrink = {"location": "bottom", "shrink": 0.8, "aspect": 40, "label": "cosine similarity"}
    figure.colorbar(drawn, ax=grid, ticks=[-1, -0.5, 0, 0.5, 1], **shrink)
    save(figure, path)


def spectrum(found: Spaces, path: Path) -> None:
    """Singular values of each space, largest first, as shares of their sum."""
    figure, ((axes,),) = make()
    for place, (name, z) in enumerate(found.items()):
        values = torch.linalg.svdvals(z.double())
        x = (torch.arange(len(values)) + 1) / z.shape[1]
        style = {**style_of(name, place), "markevery": max(1, len(x) // 8)}
        label = f"{name}: ρ = {rho(z, values):.2f}"
        axes.plot(x, values / values.sum() * len(values), **style, label=label)
    axes.set(
        xlabel="place of the singular value / dimensions",
        ylabel="singular value / their mean",
        yscale="log",
    )
    axes.set_ylim(bottom=1e-4)  # what is below is not used
    tidy(axes, loc="lower left")
    save(figure, path)


def dimension(runs: list[Run], found: Spaces, split: Split, path: Path, workers: int) -> None:
    """Recall@1 against dimension: the spaces, and the trunk's features reduced by PCA."""
    figure, ((axes,),) = make(height=4.4)
    labels = split.test.labels
    searched = None if split.gallery is None else spaces(runs, "gallery")

    def recall(z: Tensor, gallery: Tensor | None) -> float:
        pair = None if gallery is None else (gallery, split.gallery.labels)
        return 100 * recall_at_k(z, labels, ks=(1,), gallery=pair)["Recall@1"]

    for run in runs:
        fitted = run.project(split.train, workers)["features"].cpu()
        tested = run.spaces["test"]["features"].cpu()
        theirs = run.spaces["gallery"]["features"].cpu() if searched else None
        width = fitted.shape[1]
        sizes = [2**k for k in range(2, width.bit_length()) if 2**k < width] + [width]
        mean, directions = principal(fitted)
        tested = (tested - mean) @ directions
        theirs = (theirs - mean) @ directions if searched else None
        recalls = [recall(tested[:, :d], theirs[:, :d] if searched else None) for d in sizes]
        style = {**style_of(run.name, 0), "marker": ".", "alpha": 0.7}
        axes.plot(sizes, recalls, **style, label=f"features of {run.name}, PCA")
    for place, (name, z) in enumerate(found.items()):
        style = {**style_of(name, place), "ls": "", "ms": 9}
        axes.plot(z.shape[1], recall(z, searched and searched[name]), **style, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="dimensions", ylabel="Recall@1 on test classes (%)")
    tidy(axes, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    save(figure, path)


def projection(
    runs: list[Run], found: Spaces, data: Images, path: Path, seed: int, classes: int = 60
) -> None:
    """Images of random classes by t-SNE, those of ten with a colour and a marker each."""
    labels = data.labels.cpu().numpy()
    chosen = np.random.RandomState(seed).permutation(labels.max() + 1)[:classes]
    rows = np.isin(labels, chosen)
    figure, grid = make(len(runs), height=(WIDTH - 0.8) * len(runs) + 1.4)
    for axes, run in zip(grid[:, 0], runs, strict=True):
        nearby = min(15, rows.sum() / 4)
        tsne = TSNE(metric="cosine", init="random", random_state=seed, perplexity=nearby)
        points = tsne.fit_transform(found[run.name].numpy()[rows])
        axes.scatter(*points.T, s=3, color="#bbbbbb")
        for label, marker in zip(chosen[:10], MARKERS, strict=False):
            own = points[labels[rows] == label]
            name = data.names[label].replace("$", r"\$")
            axes.scatter(
                *own.T, s=36, marker=marker, edgecolors="white", linewidths=0.5, label=name[:24]
            )
        axes.set(title=run.name, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=2, loc="outside lower center", frameon=False)
    save(figure, path)
