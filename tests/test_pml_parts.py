"""Reducers, distances and regularizers of pytorch-metric-learning inside S2SDLoss.

Each is tried in one or two losses; in every kind of loss it is ``tests/matrix`` that tries them.
"""

import pytest
import torch
from pml import SIZE
from pml_parts import (
    DISTANCE_SETTINGS,
    DISTANCES,
    EMBEDDING_REGULARIZERS,
    LOSSES,
    REDUCERS,
    REFUSED,
    WEIGHT_REGULARIZERS,
    with_distance,
    with_embedding_regularizer,
    with_reducer,
    with_weight_regularizer,
)
from pml_training import DIMS, FEATURES, labels, refused, train
from pytorch_metric_learning import distances, losses, reducers

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import UnsupportedLossError


@pytest.mark.parametrize("loss", ["MultiSimilarity", "ProxyAnchor"])
@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducer_reduces_every_branch(name, loss):
    with_reducer(name, loss)


@pytest.mark.parametrize(("name", "loss"), sorted(REFUSED))
def test_a_reducer_that_a_loss_does_not_take_is_refused(name, loss):
    with_reducer(name, loss)


def test_a_reducer_that_does_not_reduce_is_refused():
    loss = losses.TripletMarginLoss(reducer=reducers.DoNothingReducer())
    assert isinstance(loss(torch.randn(len(labels()), SIZE), labels()), dict)
    with pytest.raises(UnsupportedLossError, match="DoNothingReducer.*MeanReducer"):
        S2SDLoss(loss, feature_dim=FEATURES)


@pytest.mark.parametrize("settings", DISTANCE_SETTINGS)
@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_serves_every_branch(name, settings):
    with_distance(name, "TripletMargin", settings)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_kind_of_loss_takes_another_distance(loss):
    with_distance("SNRDistance", loss, {})


def test_a_batched_distance_is_for_inference():
    distance = distances.BatchedDistance(distances.LpDistance())
    refused(losses.TripletMarginLoss(distance=distance), None, TypeError, "NoneType")


@pytest.mark.parametrize("name", EMBEDDING_REGULARIZERS)
def test_every_regularizer_of_embeddings_regularizes_every_branch(name):
    with_embedding_regularizer(name, "MultiSimilarity")


@pytest.mark.parametrize("loss", ["ProxyAnchor", "SoftTriple"])
@pytest.mark.parametrize("name", WEIGHT_REGULARIZERS)
def test_every_regularizer_of_weights_regularizes_every_branch(name, loss):
    with_weight_regularizer(name, loss)


def test_parts_are_copied_with_the_loss():
    distance, reducer = distances.LpDistance(), reducers.ThresholdReducer(low=0)
    loss_func = train(losses.TripletMarginLoss(distance=distance, reducer=reducer))
    every = [loss_func.loss, *(b.loss for b in loss_func.branches.values())]
    assert len({id(loss.distance) for loss in every}) == len({id(x.reducer) for x in every})
    assert len({id(loss.distance) for loss in every}) == 1 + len(DIMS)
