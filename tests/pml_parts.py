"""Train losses of pytorch-metric-learning made with every reducer, distance and regularizer."""

from __future__ import annotations

from typing import Any

import torch
from pml import CLASSES, SIZE, exported
from pml_training import refused, train
from pytorch_metric_learning import distances, losses, reducers, regularizers

SIZED = {"num_classes": CLASSES, "embedding_size": SIZE}
LOSSES = {
    "TripletMargin": losses.TripletMarginLoss,  # triplets
    "Contrastive": losses.ContrastiveLoss,  # positive and negative pairs
    "NTXent": losses.NTXentLoss,  # positive pairs
    "MultiSimilarity": losses.MultiSimilarityLoss,  # elements
    "Margin": losses.MarginLoss,  # triplets with a divisor
    "ProxyAnchor": lambda **kwargs: losses.ProxyAnchorLoss(**SIZED, **kwargs),
    "NormalizedSoftmax": lambda **kwargs: losses.NormalizedSoftmaxLoss(**SIZED, **kwargs),
}
WITH_WEIGHTS = (
    "ArcFace CosFace LargeMarginSoftmax NormalizedSoftmax ProxyAnchor ProxyNCA SoftTriple "
    "SphereFace SubCenterArcFace"
).split()
REDUCERS = exported(reducers, "BaseReducer", "DoNothingReducer")
DISTANCES = exported(distances, "BaseDistance", "BatchedDistance")
DISTANCE_SETTINGS = [{}, {"power": 2}, {"p": 1}, {"normalize_embeddings": False}]
WEIGHT_REGULARIZERS = exported(regularizers, "BaseRegularizer")
EMBEDDING_REGULARIZERS = [n for n in WEIGHT_REGULARIZERS if n != "SparseCentersRegularizer"]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ClassWeightedReducer": {"weights": torch.linspace(0.5, 1.5, CLASSES)},
    "MultipleReducers": {"reducers": {"pos_loss": reducers.SumReducer()}},
    "ThresholdReducer": {"low": 0.01, "high": 1000},
    "SparseCentersRegularizer": {"num_classes": CLASSES, "centers_per_class": 2},
}
NO_DIVISOR = {"TripletMargin", "Contrastive", "NTXent", "MultiSimilarity", "NormalizedSoftmax"}
# What a reducer does not take, with plain PML's error for it.
REFUSED = {
    **{("DivisorReducer", loss): (KeyError, "divisor") for loss in NO_DIVISOR},
    ("PerAnchorReducer", "TripletMargin"): (NotImplementedError, "Triplet reduction not supported"),
    ("PerAnchorReducer", "Margin"): (NotImplementedError, "Triplet reduction not supported"),
}


def with_reducer(name: str, loss: str) -> None:
    built = LOSSES[loss](reducer=getattr(reducers, name)(**ARGUMENTS.get(name, {})))
    if (name, loss) in REFUSED:
        refused(built, None, *REFUSED[name, loss])
    else:
        train(built, lr=1e-3)


def with_distance(name: str, loss: str, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    if name == "CosineSimilarity":
        settings.pop("normalize_embeddings", None)
    distance, more = getattr(distances, name)(**settings), {}
    if loss == "Contrastive" and distance.is_inverted:
        more = {"pos_margin": 1, "neg_margin": 0}
    train(
        LOSSES[loss](distance=distance, **more),
        lr=1e-3,
        shift_invariant=name == "LpDistance" and not distance.normalize_embeddings,
    )


def with_embedding_regularizer(name: str, loss: str) -> None:
    regularizer = getattr(regularizers, name)()
    train(LOSSES[loss](embedding_regularizer=regularizer, embedding_reg_weight=0.1))


def with_weight_regularizer(name: str, loss: str) -> None:
    regularizer = getattr(regularizers, name)(**ARGUMENTS.get(name, {}))
    # SparseCenters compares the two centers of a class: other losses have one a class.
    more = {"centers_per_class": 2} if loss == "SoftTriple" else {}
    if loss == "SubCenterArcFace":
        more = {"sub_centers": 2}
    built = getattr(losses, f"{loss}Loss")(**SIZED, **more, weight_regularizer=regularizer)
    if name == "SparseCentersRegularizer" and not more:
        refused(built, None, IndexError, "mask")
    else:
        train(built)
