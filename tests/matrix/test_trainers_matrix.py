"""Every trainer of pytorch-metric-learning with every kind of model."""

import pytest
from pml_trainers import KINDS, TRAINERS, trains_the_heads

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore:Converting a tensor")]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_trains_the_heads(name, kind):
    trains_the_heads(name, kind)
