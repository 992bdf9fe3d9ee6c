"""Every trainer of pytorch-metric-learning, unchanged but for the loss and its optimizer."""

import pytest
import torch
from pml_trainers import (
    ITERATIONS,
    KINDS,
    TRAINERS,
    make_trainer,
    moved,
    trains_the_heads,
    values,
)
from pytorch_metric_learning.utils import common_functions as c_f

from s2sd_pml.errors import OptimizerWarning
from s2sd_pml.optimizer import LATE

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor")
SUBSETS = ["MetricLossOnly", "TrainWithClassifier"]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_trains_the_heads(name):
    trains_the_heads(name, "usual")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "usual"])
def test_a_trainer_trains_the_heads_of_other_models(kind):
    trains_the_heads("TrainWithClassifier", kind)


@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_batch_miner_chooses_the_samples(name):
    trainer, ours = make_trainer(name, subset=True)
    before = values(ours["metric_loss"])
    trainer.train()
    assert all(moved(ours["metric_loss"], before))
    assert int(ours["metric_loss"].step) == ITERATIONS  # its extra forward is no step


@pytest.mark.parametrize("name", sorted(set(TRAINERS) - set(SUBSETS) - {"StepsTheLosses"}))
def test_pml_takes_no_subset_batch_miner_in_other_trainers(name):
    with pytest.raises(AssertionError, match="mining_funcs keys must be one of"):
        make_trainer(name, subset=True)


@pytest.mark.parametrize("name", ["MetricLossOnly", "TwoStreamMetricLoss"])
def test_a_frozen_metric_loss_is_in_eval_and_distils_nothing(name):
    trainer, ours = make_trainer(name, freeze_these=("metric_loss",))
    before, trunk = values(ours["metric_loss"]), values(trainer.models["trunk"])
    trainer.train(num_epochs=2)
    assert not any(moved(ours["metric_loss"], before))
    assert all(moved(trainer.models["trunk"], trunk))
    assert int(ours["metric_loss"].step) == 0
    assert ours["metric_loss"].components["distill"] == 0


@pytest.mark.parametrize("name", TRAINERS)
def test_a_missing_optimizer_of_the_loss_is_reported(name):
    trainer, _ = make_trainer(name, loss_optimizer=False)
    with pytest.warns(OptimizerWarning, match="metric_loss_optimizer"):
        trainer.train(num_epochs=2)


def test_deep_adversarial_metric_learning_never_steps_the_loss():
    """PML's trainer knows the optimizers of its models only; the warning comes, if late."""
    trainer, ours = make_trainer("DeepAdversarialMetricLearning")
    before = values(ours["metric_loss"])
    with pytest.warns(OptimizerWarning, match="Their optimizer never stepped"):
        trainer.train(num_epochs=2 + LATE // ITERATIONS)
    assert not any(moved(ours["metric_loss"], before))


def test_deep_adversarial_metric_learning_steps_heads_with_the_embedder():
    trainer, ours = make_trainer("DeepAdversarialMetricLearning", loss_optimizer=False)
    for loss_func in ours.values():
        loss_func.add_to(trainer.optimizers["embedder_optimizer"])
    before = values(ours["metric_loss"])
    trainer.train(num_epochs=2)
    assert all(moved(ours["metric_loss"], before))


def test_deep_adversarial_metric_learning_in_its_phases():
    """The metric loss is not called while the generator trains alone."""
    trainer, ours = make_trainer("StepsTheLosses", metric_alone_epochs=1, g_alone_epochs=1)
    steps, loss_func = [], ours["metric_loss"]
    trainer.end_of_epoch_hook = lambda _: steps.append(int(loss_func.step))
    trainer.train(num_epochs=3)
    assert steps == [ITERATIONS, ITERATIONS, 2 * ITERATIONS]


def test_a_trainer_saves_what_a_fresh_one_loads(tmp_path):
    trainer, ours = make_trainer("MetricLossOnly", parallel=True)
    trainer.train()
    c_f.save_dict_of_models(trainer.loss_funcs, 1, str(tmp_path))
    fresh, others = make_trainer("MetricLossOnly")
    c_f.load_dict_of_models(fresh.loss_funcs, 1, str(tmp_path), "cpu")
    for a, b in zip(values(ours["metric_loss"]), values(others["metric_loss"]), strict=True):
        assert torch.equal(a, b)
    assert int(others["metric_loss"].step) == ITERATIONS
