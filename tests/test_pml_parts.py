"""Reducers, distances and regularizers of pytorch-metric-learning inside S2SDLoss."""

import pytest
import torch
from pml import CLASSES, SIZE, exported
from pml_training import DIMS, FEATURES, labels, refused, train
from pytorch_metric_learning import distances, losses, reducers, regularizers

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import UnsupportedLossError

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
REDUCERS = {
    "ClassWeightedReducer": {"weights": torch.linspace(0.5, 1.5, CLASSES)},
    "MultipleReducers": {"reducers": {"pos_loss": reducers.SumReducer()}},
    "ThresholdReducer": {"low": 0.01, "high": 1000},
}
NO_DIVISOR = {"TripletMargin", "Contrastive", "NTXent", "MultiSimilarity", "NormalizedSoftmax"}
# What a reducer does not take, with plain PML's error for it.
REFUSED = {
    **{("DivisorReducer", loss): (KeyError, "divisor") for loss in NO_DIVISOR},
    ("PerAnchorReducer", "TripletMargin"): (NotImplementedError, "Triplet reduction not supported"),
    ("PerAnchorReducer", "Margin"): (NotImplementedError, "Triplet reduction not supported"),
}
REGULARIZERS = {"SparseCentersRegularizer": {"num_classes": CLASSES, "centers_per_class": 2}}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", exported(reducers, "BaseReducer", "DoNothingReducer"))
def test_every_reducer_reduces_every_branch(name, loss):
    built = LOSSES[loss](reducer=getattr(reducers, name)(**REDUCERS.get(name, {})))
    if (name, loss) in REFUSED:
        refused(built, None, *REFUSED[name, loss])
    else:
        train(built, lr=1e-3)


def test_a_reducer_that_does_not_reduce_is_refused():
    loss = losses.TripletMarginLoss(reducer=reducers.DoNothingReducer())
    assert isinstance(loss(torch.randn(len(labels()), SIZE), labels()), dict)
    with pytest.raises(UnsupportedLossError, match="DoNothingReducer.*MeanReducer"):
        S2SDLoss(loss, feature_dim=FEATURES)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("settings", [{}, {"power": 2}, {"p": 1}, {"normalize_embeddings": False}])
@pytest.mark.parametrize("name", exported(distances, "BaseDistance", "BatchedDistance"))
def test_every_distance_serves_every_branch(name, loss, settings):
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


def test_a_batched_distance_is_for_inference():
    distance = distances.BatchedDistance(distances.LpDistance())
    refused(losses.TripletMarginLoss(distance=distance), None, TypeError, "NoneType")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", exported(regularizers, "BaseRegularizer", "SparseCentersRegularizer")
)
def test_every_regularizer_of_embeddings_regularizes_every_branch(name, loss):
    regularizer = getattr(regularizers, name)()
    train(LOSSES[loss](embedding_regularizer=regularizer, embedding_reg_weight=0.1))


@pytest.mark.parametrize(
    "loss",
    "ArcFace CosFace LargeMarginSoftmax NormalizedSoftmax ProxyAnchor ProxyNCA SoftTriple "
    "SphereFace SubCenterArcFace".split(),
)
@pytest.mark.parametrize("name", exported(regularizers, "BaseRegularizer"))
def test_every_regularizer_of_weights_regularizes_every_branch(name, loss):
    regularizer = getattr(regularizers, name)(**REGULARIZERS.get(name, {}))
    # SparseCenters compares the two centers of a class: other losses have one a class.
    more = {"centers_per_class": 2} if loss == "SoftTriple" else {}
    if loss == "SubCenterArcFace":
        more = {"sub_centers": 2}
    built = getattr(losses, f"{loss}Loss")(**SIZED, **more, weight_regularizer=regularizer)
    if name == "SparseCentersRegularizer" and not more:
        refused(built, None, IndexError, "mask")
    else:
        train(built)


def test_parts_are_copied_with_the_loss():
    distance, reducer = distances.LpDistance(), reducers.ThresholdReducer(low=0)
    loss_func = train(losses.TripletMarginLoss(distance=distance, reducer=reducer))
    every = [loss_func.loss, *(b.loss for b in loss_func.branches.values())]
    assert len({id(loss.distance) for loss in every}) == len({id(x.reducer) for x in every})
    assert len({id(loss.distance) for loss in every}) == 1 + len(DIMS)
