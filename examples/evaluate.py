"""Retrieval and clustering metrics: every image is a query, all the others are the gallery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans
from torch import Tensor, nn

KS = (1, 2, 4, 8)
METRICS = (*(f"Recall@{k}" for k in KS), "MAP@R", "NMI")


@torch.no_grad()
def apply(module: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """The module's output for all images, in evaluation mode."""
    was_training = module.training
    module.eval()
    outputs = torch.cat([module(batch) for batch in images.split(batch_size)])
    module.train(was_training)
    return outputs


def nearest(embeddings: Tensor, k: int) -> Tensor:
    """Indices (N, k) of the k most similar others of every row, by cosine, best first."""
    normalised = F.normalize(embeddings, dim=1)
    similarity = normalised @ normalised.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(k, dim=1).indices


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall@K of metric learning: the share of queries with a hit among their K nearest."""
    hits = labels[nearest(embeddings, max(ks))] == labels[:, None]
    return {f"Recall@{k}": hits[:, :k].any(dim=1).float().mean().item() for k in ks}


def kmeans(embeddings: Tensor, clusters: int) -> Tensor:
    """k-means by scikit-learn, in double precision and with a fixed seed."""
    model = KMeans(clusters, n_init=1, random_state=0)
    return torch.from_numpy(model.fit_predict(embeddings.double().cpu().numpy()))


def evaluate(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """All of ``METRICS``, as fractions of 1."""
    embeddings = F.normalize(embeddings, dim=1)
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "NMI"),
        k="max_bin_count",
        device=embeddings.device,
        knn_func=CustomKNN(CosineSimilarity()),
        kmeans_func=kmeans,
    )
    scores = calculator.get_accuracy(embeddings, labels)
    return {
        **recall_at_k(embeddings, labels),
        "MAP@R": scores["mean_average_precision_at_r"],
        "NMI": float(scores["NMI"]),
    }
