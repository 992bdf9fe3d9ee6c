"""Every reducer, distance and regularizer of pytorch-metric-learning in every kind of loss."""

import pytest
from pml_parts import (
    DISTANCE_SETTINGS,
    DISTANCES,
    EMBEDDING_REGULARIZERS,
    LOSSES,
    REDUCERS,
    WEIGHT_REGULARIZERS,
    WITH_WEIGHTS,
    with_distance,
    with_embedding_regularizer,
    with_reducer,
    with_weight_regularizer,
)

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducer_reduces_every_branch(name, loss):
    with_reducer(name, loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("settings", DISTANCE_SETTINGS)
@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_serves_every_branch(name, loss, settings):
    with_distance(name, loss, settings)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", EMBEDDING_REGULARIZERS)
def test_every_regularizer_of_embeddings_regularizes_every_branch(name, loss):
    with_embedding_regularizer(name, loss)


@pytest.mark.parametrize("loss", WITH_WEIGHTS)
@pytest.mark.parametrize("name", WEIGHT_REGULARIZERS)
def test_every_regularizer_of_weights_regularizes_every_branch(name, loss):
    with_weight_regularizer(name, loss)
