"""Retrieval and clustering metrics.

Without a gallery every image is a query, and all the others are the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans
from torch import Tensor, nn

from .images import BATCH, KS, Images

ROWS = 2048  # of the similarity matrix held at once


@torch.no_grad()
def apply(module: nn.Module, images: Tensor | Images, workers: int = 0) -> Tensor:
    """The module's output for all images, in evaluation mode."""
    return spaces_of([module], lambda x: {"": module(x)}, images, workers)[""]


@torch.no_grad()
def spaces_of(
    modules: Sequence[nn.Module],
    function: Callable[[Tensor], dict[str, Tensor]],
    images: Tensor | Images,
    workers: int = 0,
) -> dict[str, Tensor]:
    """What a function makes of all images, batch by batch, with modules in evaluation mode."""
    was_training = [module.training for module in modules]
    device = next(modules[0].parameters()).device
    batches: Any = images.split(BATCH) if isinstance(images, Tensor) else _loaded(images, workers)
    for module in modules:
        module.eval()
    made = [function(batch.to(device)) for batch in batches]
    for module, training in zip(modules, was_training, strict=True):
        module.train(training)
    return {name: torch.cat([outputs[name] for outputs in made]) for name in made[0]}


def _loaded(images: Images, workers: int) -> Any:
    return (batch for batch, _ in images.loader(workers))


def nearest(embeddings: Tensor, k: int, gallery: Tensor | None = None) -> Tensor:
    """Indices (N, k) of the k most similar of the gallery, by cosine, best first.

    Without a gallery they are of the other rows.
    """
    queries = F.normalize(embeddings, dim=1)
    others = queries if gallery is None else F.normalize(gallery, dim=1)
    found = []
    for first in range(0, len(queries), ROWS):
        similarity = queries[first : first + ROWS] @ others.T
        if gallery is None:
            similarity.diagonal(first).fill_(-torch.inf)
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    ks: Sequence[int] = KS,
    gallery: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Recall@K of metric learning: the share of queries with a hit among their K nearest.

    Args:
        gallery: embeddings and labels of what is searched, if that is another set.
    """
    searched, theirs = gallery or (None, labels)
    there = len(embeddings) - 1 if searched is None else len(searched)
    found = nearest(embeddings, min(max(ks), there), searched)
    hits = theirs.to(found.device)[found] == labels.to(found.device)[:, None]
    return {f"Recall@{k}": hits[:, :k].any(dim=1).float().mean().item() for k in ks}


def kmeans(embeddings: Tensor, clusters: int) -> Tensor:
    """k-means by scikit-learn, in double precision and with a fixed seed."""
    model = KMeans(clusters, n_init=1, random_state=0)
    return torch.from_numpy(model.fit_predict(embeddings.double().cpu().numpy()))


def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    ks: Sequence[int] = KS,
    gallery: tuple[Tensor, Tensor] | None = None,
    nmi: bool = True,
) -> dict[str, float]:
    """Recall@K, MAP@R and NMI, that of the queries, as fractions of 1."""
    embeddings = F.normalize(embeddings, dim=1)
    labels = labels.to(embeddings.device)
    reference = {}
    if gallery:
        searched = F.normalize(gallery[0], dim=1)
        reference = {"reference": searched, "reference_labels": gallery[1].to(labels.device)}
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", *(["NMI"] if nmi else [])),
        k="max_bin_count",
        device=embeddings.device,
        knn_func=CustomKNN(CosineSimilarity(), batch_size=ROWS),
        kmeans_func=kmeans,
    )
    scores = calculator.get_accuracy(embeddings, labels, **reference)
    return {
        **recall_at_k(embeddings, labels, ks, gallery),
        "MAP@R": scores["mean_average_precision_at_r"],
        **({"NMI": float(scores["NMI"])} if nmi else {}),
    }
