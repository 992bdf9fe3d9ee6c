"""PML's MetricLossOnly trainer with its sampler, tester and hooks. Marked S2SD: what is added.

python examples/pml_trainer.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pytorch_metric_learning import losses, miners, samplers, testers, trainers
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.utils.data import TensorDataset
from trainer import icons
from trainer.network import Network

from s2sd_pml import S2SDLoss  # S2SD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/pml_trainer"))
    args = parser.parse_args()
    torch.manual_seed(0)
    seen, unseen = (TensorDataset(s.images, s.labels) for s in icons.split(icons.load()))

    network = Network(embedding_size=16)
    models = {
        "trunk": nn.Sequential(network.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "embedder": network.embedder,
    }
    loss_func = S2SDLoss(  # S2SD
        losses.MultiSimilarityLoss(2, 50, 0.5),
        miners.MultiSimilarityMiner(0.1),
        embedder=models["embedder"],  # S2SD
        head_dims=(256, 512),  # S2SD
        distill_weight=5,  # S2SD
        feature_distill_weight=0,  # S2SD
    )
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(model.parameters(), lr=2e-3)
        for name, model in [*models.items(), ("metric_loss", loss_func)]  # S2SD: the last one
    }

    records, _, _ = logging_presets.get_record_keeper(
        str(args.output / "records"), str(args.output / "tensorboard")
    )
    hooks = logging_presets.get_hook_container(records, primary_metric="precision_at_1")
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
        dataloader_num_workers=0,
    )
    trainer = trainers.MetricLossOnly(
        models,
        optimizers,
        batch_size=128,
        loss_funcs={"metric_loss": loss_func},
        dataset=seen,
        sampler=samplers.MPerClassSampler(seen.tensors[1], m=4, length_before_new_iter=1600),
        dataloader_num_workers=0,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(
            tester, {"val": unseen}, str(args.output / "models"), test_interval=1
        ),
    )
    trainer.train(num_epochs=args.epochs)
    recall = tester.all_accuracies["val"]["precision_at_1_level0"]
    print(f"Recall@1 on unseen classes: {100 * recall:.1f}%")


if __name__ == "__main__":
    main()
