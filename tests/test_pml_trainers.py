"""PML's own trainer, unchanged but for the loss and its optimizer."""

import pytest
import torch
from helpers import F_DIM
from pytorch_metric_learning import losses, miners, samplers, trainers
from pytorch_metric_learning.utils import common_functions as c_f
from torch import nn
from torch.utils.data import TensorDataset

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import OptimizerWarning


def make(kind, with_optimizer=True):
    trunk, embedder = nn.Sequential(nn.Linear(6, F_DIM), nn.ReLU()), nn.Linear(F_DIM, 4)
    if kind == "data_parallel":
        trunk, embedder = nn.DataParallel(trunk), nn.DataParallel(embedder)
    loss_func = S2SDLoss(
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(),
        embedder=embedder,
        head_dims=(8, 16),
        feature_delay=2,
    )
    models = {"trunk": trunk, "embedder": embedder}
    if kind == "no_embedder_key":
        models = {"trunk": nn.Sequential(trunk, embedder)}
    optimizers = {f"{n}_optimizer": torch.optim.Adam(m.parameters()) for n, m in models.items()}
    if with_optimizer:
        optimizers["metric_loss_optimizer"] = torch.optim.Adam(loss_func.parameters())
    labels = torch.arange(10).repeat_interleave(8)
    trainer = trainers.MetricLossOnly(
        models,
        optimizers,
        batch_size=20,
        loss_funcs={"metric_loss": loss_func},
        mining_funcs={"tuple_miner": miners.BatchHardMiner()},
        dataset=TensorDataset(torch.randn(80, 6), labels),
        sampler=samplers.MPerClassSampler(labels, 4, 20, 80),
        dataloader_num_workers=0,
        iterations_per_epoch=4,
        freeze_these=("trunk",) if kind == "frozen_trunk" else (),
    )
    return trainer, loss_func


@pytest.mark.parametrize("kind", ["usual", "no_embedder_key", "data_parallel", "frozen_trunk"])
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_metric_loss_only_trains_the_heads(kind, tmp_path):
    trainer, loss_func = make(kind)
    before = [p.detach().clone() for p in loss_func.parameters()]
    trainer.train(num_epochs=2)
    assert int(loss_func.step) == 8
    assert loss_func.components["feature_distill"] > 0
    assert all(not torch.equal(p, q) for p, q in zip(before, loss_func.parameters(), strict=True))
    c_f.save_dict_of_models({"metric_loss": loss_func}, 1, str(tmp_path))
    _, fresh = make(kind)
    c_f.load_dict_of_models({"metric_loss": fresh}, 1, str(tmp_path), "cpu")
    assert int(fresh.step) == 8


def test_a_missing_metric_loss_optimizer_is_told():
    trainer, _ = make("usual", with_optimizer=False)
    with pytest.warns(OptimizerWarning, match="metric_loss_optimizer"):
        trainer.train(num_epochs=2)
