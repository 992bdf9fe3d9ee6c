"""Build PML's five trainers around S2SDLoss, on a small data set of tensors."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import losses, miners, samplers, testers, trainers
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from s2sd_pml import S2SDLoss

TRAINERS = (
    "MetricLossOnly TrainWithClassifier CascadedEmbeddings TwoStreamMetricLoss StepsTheLosses"
).split()
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "no embedder key": {"embedder_key": False},
    "data parallel": {"parallel": True},
    "frozen trunk": {"freeze_these": ("trunk",)},
    "frozen embedder": {"freeze_these": ("embedder",)},
}
INPUT, FEATURES, SIZE, CLASSES, ITERATIONS = 6, 12, 6, 10, 4
LABELS = torch.arange(CLASSES).repeat_interleave(8)


class StepsTheLosses(trainers.DeepAdversarialMetricLearning):
    """PML's trainer never steps the optimizers of its losses; this one does."""

    def step_optimizers(self) -> None:
        super().step_optimizers()
        for name in self.loss_funcs:
            if self.do_metric and f"{name}_optimizer" in self.optimizers:
                self.optimizers[f"{name}_optimizer"].step()


class HalfOfTheBatch(nn.Module):
    """A subset_batch_miner: the indices of the samples to train on."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        assert not embeddings.requires_grad
        return torch.arange(0, len(labels), 2)


def samples() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(LABELS), INPUT, generator=generator)
    return torch.randn(CLASSES, INPUT, generator=generator)[LABELS] + noise


def make_trainer(
    name: str,
    *,
    embedder_key: bool = True,
    parallel: bool = False,
    subset: bool = False,
    loss_optimizer: bool = True,
    lr: float = 1e-3,
    **kwargs: Any,
) -> tuple[Any, dict[str, S2SDLoss]]:
    """The trainer and its S2SD losses by name."""
    trunk: nn.Module = nn.Sequential(nn.Linear(INPUT, FEATURES), nn.ReLU())
    embedder: nn.Module = nn.Linear(FEATURES, SIZE)
    if parallel:  # without GPUs it passes through
        trunk, embedder = nn.DataParallel(trunk), nn.DataParallel(embedder)
    models = {"trunk": trunk, "embedder": embedder}
    if not embedder_key:
        models = {"trunk": nn.Sequential(trunk, embedder)}

    def s2sd() -> S2SDLoss:
        loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
        return S2SDLoss(loss, miner, embedder=embedder, head_dims=(8, 16), feature_distill_delay=2)

    loss_funcs: dict[str, nn.Module] = {"metric_loss": s2sd()}
    mining_funcs: dict[str, nn.Module] = {"tuple_miner": miners.BatchHardMiner()}
    data = [samples(), LABELS]
    if name == "CascadedEmbeddings":
        kwargs["embedding_sizes"] = [SIZE // 2, SIZE // 2]
        loss_funcs = {"metric_loss_0": s2sd(), "metric_loss_1": s2sd()}
        mining_funcs = {"tuple_miner_1": miners.HDCMiner(filter_percentage=0.5)}
    elif name == "TwoStreamMetricLoss":
        data.insert(0, samples() + 0.1)
    elif name != "MetricLossOnly":
        models["classifier"] = nn.Linear(SIZE, CLASSES)
        loss_funcs["classifier_loss"] = nn.CrossEntropyLoss()
    if "DeepAdversarial" in name or name == "StepsTheLosses":
        width = FEATURES if embedder_key else SIZE
        models["generator"] = nn.Linear(3 * width, width)
        loss_funcs["synth_loss"] = s2sd() if embedder_key else losses.TripletMarginLoss()
        loss_funcs["g_adv_loss"] = losses.TripletMarginLoss()
        kwargs["g_triplets_per_anchor"] = 4
    if subset:
        mining_funcs["subset_batch_miner"] = HalfOfTheBatch()
    ours = {n: loss for n, loss in loss_funcs.items() if isinstance(loss, S2SDLoss)}
    optimizers = {f"{n}_optimizer": torch.optim.Adam(m.parameters(), lr) for n, m in models.items()}
    if loss_optimizer:
        optimizers |= {f"{n}_optimizer": torch.optim.Adam(m.parameters()) for n, m in ours.items()}
    trainer = (StepsTheLosses if name == "StepsTheLosses" else getattr(trainers, name))(
        models=models,
        optimizers=optimizers,
        batch_size=20,
        loss_funcs=loss_funcs,
        mining_funcs=mining_funcs,
        dataset=TensorDataset(*data),
        sampler=samplers.MPerClassSampler(LABELS, 4, 20, len(LABELS)),
        dataloader_num_workers=0,
        iterations_per_epoch=ITERATIONS,
        data_device="cpu",
        **kwargs,
    )
    return trainer, ours


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)]


def trains_the_heads(name: str, kind: str) -> None:
    """Two epochs move every parameter, but for those of models that are frozen."""
    trainer, ours = make_trainer(name, **KINDS[kind])
    modules = {**ours, **trainer.models}
    before = {n: values(m) for n, m in modules.items()}
    trainer.train(num_epochs=2)
    still = KINDS[kind].get("freeze_these", ())
    if name == "StepsTheLosses":  # PML: this trainer steps what freeze_these names
        still = ()
    for n, module in modules.items():
        assert all(moved(module, before[n])) == (n not in still), n
    for loss_func in ours.values():
        assert int(loss_func.step) == 2 * ITERATIONS
        assert loss_func.components["distill"] > 0
        assert loss_func.components["feature_distill"] > 0


class Experiment:
    """PML's hooks: records, checkpoints, and a tester between epochs."""

    def __init__(self, folder: Any, patience: int | None = None) -> None:
        self.models, self.board = str(folder / "models"), str(folder / "board")
        self.records, _, self.writer = logging_presets.get_record_keeper(
            str(folder / "records"), self.board
        )
        self.hooks = logging_presets.get_hook_container(self.records, log_freq=1)
        self.tester = testers.GlobalEmbeddingSpaceTester(
            end_of_testing_hook=self.hooks.end_of_testing_hook,
            dataloader_num_workers=0,
            data_device="cpu",
            accuracy_calculator=AccuracyCalculator(
                include=("mean_average_precision_at_r", "precision_at_1"),
                k="max_bin_count",
                knn_func=CustomKNN(CosineSimilarity()),
            ),
        )
        validation = {"val": TensorDataset(samples() + 0.2, LABELS)}
        self.of_trainer = {
            "end_of_iteration_hook": self.hooks.end_of_iteration_hook,
            "end_of_epoch_hook": self.hooks.end_of_epoch_hook(
                self.tester, validation, self.models, patience=patience
            ),
        }
