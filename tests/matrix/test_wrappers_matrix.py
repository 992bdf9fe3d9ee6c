"""Losses of pytorch-metric-learning that hold another one, around every loss that they support."""

import pytest
from pml_training import in_cross_batch_memory, in_self_supervised
from pytorch_metric_learning import losses

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("name", losses.SelfSupervisedLoss.supported_losses())
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_around_every_loss_that_it_supports(name, symmetric):
    in_self_supervised(name, symmetric)


@pytest.mark.parametrize("name", losses.CrossBatchMemory.supported_losses())
@pytest.mark.parametrize("mined", ["no", "inside", "outside"])
def test_cross_batch_memory_around_every_loss_that_it_supports(name, mined):
    in_cross_batch_memory(name, mined)
