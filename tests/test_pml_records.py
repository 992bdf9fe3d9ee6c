"""PML's hooks around S2SDLoss: records, TensorBoard, checkpoints, resuming, patience."""

import copy
import sqlite3
from pathlib import Path

import pytest
import torch
from pml_trainers import ITERATIONS, TRAINERS, Experiment, make_trainer
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import logging_presets
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from s2sd_pml import S2SDLoss

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor")
COMPONENTS = ["base", "aux", "distill", "feature_distill", "aux_8", "distill_8", "aux_16"]


def rows(database, table, columns):
    with sqlite3.connect(database) as connection:
        return connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_components_are_recorded_and_training_resumes(name, tmp_path):
    experiment = Experiment(tmp_path)
    trainer, ours = make_trainer(name, **experiment.of_trainer)
    trainer.train(num_epochs=2)
    experiment.writer.flush()
    board = EventAccumulator(experiment.board).Reload()
    for key, loss_func in ours.items():
        table = f"{key}_S2SDLoss_components"
        recorded = rows(tmp_path / "records" / "logs.db", table, COMPONENTS)
        assert len(recorded) == 2 * ITERATIONS
        assert recorded[-1] == tuple(loss_func.components[c].item() for c in COMPONENTS)
        for component in COMPONENTS:
            scalars = board.Scalars(f"{table}/{component}")
            assert [s.step for s in scalars] == list(range(2 * ITERATIONS))
            assert scalars[-1].value == pytest.approx(loss_func.components[component].item())
    assert len(experiment.hooks.get_loss_history()["total_loss"]) == 2 * ITERATIONS
    history = experiment.hooks.get_accuracy_history(experiment.tester, "val")
    assert history["epoch"] == [1, 2]

    again = Experiment(tmp_path)
    fresh, others = make_trainer(name, **again.of_trainer)
    epoch = again.hooks.load_latest_saved_models(fresh, again.models, device="cpu")
    assert epoch == 3
    for key, loss_func in others.items():
        assert same(loss_func, ours[key])
        assert int(loss_func.step) == 2 * ITERATIONS
    fresh.train(start_epoch=epoch, num_epochs=3)
    assert all(int(loss_func.step) == 3 * ITERATIONS for loss_func in others.values())
    assert again.hooks.get_accuracy_history(again.tester, "val")["epoch"] == [1, 2, 3]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_best_epoch_is_kept_and_patience_ends_training(name, tmp_path):
    experiment = Experiment(tmp_path, patience=1)
    trainer, ours = make_trainer(name, lr=0.0, **experiment.of_trainer)  # the model stands still
    of_epoch = {}

    def remember(trainer, hook=trainer.end_of_epoch_hook):
        of_epoch[trainer.epoch] = copy.deepcopy(ours)
        return hook(trainer)

    trainer.end_of_epoch_hook = remember
    trainer.train(num_epochs=9)
    assert trainer.epoch == 3
    assert experiment.hooks.get_best_epoch_and_accuracy(experiment.tester, "val")[0] == 1
    fresh, others = make_trainer(name)
    hooks = experiment.hooks
    assert hooks.load_latest_saved_models(fresh, experiment.models, device="cpu", best=True) == 2
    assert all(same(others[key], of_epoch[1][key]) for key in ours)
    assert not any(same(others[key], ours[key]) for key in ours)


def log(keeper, loss, iteration):
    """As PML's end_of_iteration_hook does."""
    keeper.update_records({"metric_loss": loss}, iteration, recursive_types=[nn.Module, dict])


def records_of(loss, folder, feature_dim=8):
    """What PML's hook records of a loss that was called once and logged three times."""
    keeper, records, _ = logging_presets.get_record_keeper(str(folder), str(folder))
    z, φ = torch.randn(12, 6, requires_grad=True), torch.randn(12, feature_dim)
    labels = torch.arange(12) // 3
    loss(z, labels, features=φ) if isinstance(loss, S2SDLoss) else loss(z, labels)
    for iteration in range(3):
        log(keeper, loss, iteration)
    return keeper, records


def test_no_weight_of_a_head_or_of_a_branch_is_recorded(tmp_path):
    loss_func = S2SDLoss(
        losses.ProxyAnchorLoss(4, 6),
        miners.MultiSimilarityMiner(),
        feature_dim=8,
        head_dims=(9, 10),
        head=lambda f, d: nn.Sequential(nn.Linear(f, d), nn.ReLU(), nn.Linear(d, d)),
    )
    keeper, records = records_of(loss_func, tmp_path)
    lists = [(table, series) for table, series in records.records_that_are_lists]
    assert lists == [("loss_ProxyAnchorLoss__parameters", "proxies")]  # as of the plain loss
    _, plain = records_of(loss_func.loss, tmp_path)
    assert [series for _, series in plain.records_that_are_lists] == ["proxies"]
    keeper.save_records()  # names that start with a digit, of nn.Sequential, would fail here


def test_multiple_losses_in_a_list_cannot_be_recorded_with_or_without_s2sd(tmp_path):
    """record_keeper makes a table named ``0_...`` of a ModuleList's child; a dict has names."""
    parts = [losses.TripletMarginLoss(), losses.ContrastiveLoss()]
    named = losses.MultipleLosses(dict(zip("ab", parts, strict=True)))
    listed = losses.MultipleLosses(parts)
    for n, loss in enumerate([listed, S2SDLoss(listed, feature_dim=8, head_dims=(9,))]):
        keeper, _ = records_of(loss, tmp_path / f"listed{n}")
        with pytest.raises(sqlite3.OperationalError, match="unrecognized token"):
            keeper.save_records()
    for n, loss in enumerate([named, S2SDLoss(named, feature_dim=8, head_dims=(9,))]):
        records_of(loss, tmp_path / f"named{n}")[0].save_records()


def test_own_records_and_those_of_the_base_branch_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    loss_func = S2SDLoss(
        losses.ContrastiveLoss(), miners.PairMarginMiner(), feature_dim=8, head_dims=(9,)
    )
    keeper, records = records_of(loss_func, tmp_path)
    own = records.records["metric_loss_S2SDLoss"]
    for name in ("base_loss", "aux_loss", "distill_loss", "feature_distill_loss"):
        assert own[name][2] == loss_func.components[name.removesuffix("_loss")]
    pairs = records.records["metric_loss_S2SDLoss__modules_miner_PairMarginMiner"]
    assert pairs["num_pos_pairs"][2] == loss_func.miner.num_pos_pairs
    keeper.save_records()


def test_the_hidden_branches_are_modules_as_ever():
    loss_func = S2SDLoss(losses.TripletMarginLoss(), feature_dim=8, head_dims=(9, 10))
    key = "branches.head_9.head.hidden.weight"
    weight = loss_func.branches["head_9"].head.hidden.weight
    assert loss_func.state_dict()[key].data_ptr() == weight.data_ptr()
    assert any(weight is p for p in loss_func.parameters())
    assert loss_func.get_parameter(key) is weight
    assert loss_func.branches.head_9.head.hidden.weight is weight
    assert "(head_9): Branch(" in repr(loss_func)
    clone = copy.deepcopy(loss_func)
    assert same(clone, loss_func)
    assert clone.get_parameter(key) is not weight
    clone.double()
    assert clone.get_parameter(key).dtype == torch.float64
    assert weight.dtype == torch.float32


def resident_mebibytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_hundred_records_of_the_papers_heads_take_little_memory(tmp_path):
    loss_func = S2SDLoss(
        losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(), feature_dim=128
    )
    assert loss_func.head_dims == (512, 1024, 1536, 2048)
    keeper, records = records_of(loss_func, tmp_path, feature_dim=128)
    before = resident_mebibytes()
    for iteration in range(3, 203):
        log(keeper, loss_func, iteration)
        assert resident_mebibytes() - before < 50  # at once: each record took 170 MiB
    assert not records.records_that_are_lists
    keeper.save_records()
