"""A Lightning module. The loss is a part of it: its heads are optimized and saved with the rest.

pip install lightning && python examples/lightning_module.py
"""

from __future__ import annotations

import argparse

import lightning
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from trainer import icons
from trainer.evaluate import recall_at_k
from trainer.network import Network

from s2sd_pml import S2SDLoss  # S2SD


class Retrieval(lightning.LightningModule):
    """Images to embeddings. Deploy ``self.model`` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Network(embedding_size=16)
        self.loss_func = S2SDLoss(  # S2SD
            losses.MultiSimilarityLoss(2, 50, 0.5),
            miners.MultiSimilarityMiner(0.1),
            embedder=self.model.embedder,  # S2SD
            head_dims=(256, 512),  # S2SD
            distill_weight=5,  # S2SD
            feature_distill_weight=0,  # S2SD
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = self.loss_func(self.model(images), labels)
        self.log_dict(self.loss_func.components)  # S2SD
        return loss

    def on_validation_epoch_start(self) -> None:
        self.validated: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.validated.append((self.model(images), labels))

    def on_validation_epoch_end(self) -> None:
        embeddings, labels = (torch.cat(part) for part in zip(*self.validated, strict=True))
        self.log_dict(recall_at_k(embeddings, labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)  # model and heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    lightning.seed_everything(0)
    seen, unseen = (TensorDataset(s.images, s.labels) for s in icons.split(icons.load()))
    sampler = MPerClassSampler(seen.tensors[1], m=4, batch_size=128, length_before_new_iter=1600)
    trainer = lightning.Trainer(
        max_epochs=args.epochs, num_sanity_val_steps=0, logger=False, enable_checkpointing=False
    )
    module = Retrieval()
    trainer.fit(
        module,
        DataLoader(seen, batch_size=128, sampler=sampler, drop_last=True),
        DataLoader(unseen, batch_size=400),
    )
    print(f"Recall@1 on unseen classes: {100 * trainer.callback_metrics['Recall@1']:.1f}%")


if __name__ == "__main__":
    main()
