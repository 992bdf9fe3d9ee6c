"""A Lightning module. The loss is a part of it, so its heads are trained
and saved with the model. The lines marked S2SD are new.

pip install s2sd-pml lightning && python lightning_module.py
"""

import lightning
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2sd_pml import S2SDLoss  # S2SD


class Retrieval(lightning.LightningModule):
    """Images (B, 1, 8, 8) to embeddings (B, 8). Deploy trunk and fc."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(128, 8)
        # was: self.loss_func = losses.MultiSimilarityLoss()
        # was: self.miner = miners.MultiSimilarityMiner()
        self.loss_func = S2SDLoss(  # S2SD
            losses.MultiSimilarityLoss(),
            miners.MultiSimilarityMiner(),  # S2SD: in every space
            embedder=self.fc,  # S2SD: its input is the features
            **S2SDLoss.recipe("from-scratch"),  # S2SD: not if pretrained
        )

    def forward(self, images):
        return self.fc(self.trunk(images))

    def training_step(self, batch):
        images, labels = batch
        # was: loss = self.loss_func(z, labels, self.miner(z, labels))
        loss = self.loss_func(self(images), labels)
        self.log_dict(self.loss_func.components)  # S2SD: optional
        return loss

    def validation_step(self, batch):
        images, labels = batch  # all of them
        z = nn.functional.normalize(self(images))
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(dim=1)
        recall = (labels[nearest] == labels).float().mean()
        self.log("recall", recall, prog_bar=True)

    def configure_optimizers(self):
        # the model, and the heads in self.loss_func
        return torch.optim.Adam(self.parameters(), lr=1e-3)


# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5
data = TensorDataset(images[seen], labels[seen])
test_data = TensorDataset(images[unseen], labels[unseen])
sampler = MPerClassSampler(labels[seen], m=20, length_before_new_iter=900)

lightning.seed_everything(0)
trainer = lightning.Trainer(
    max_epochs=20,
    num_sanity_val_steps=0,
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(
    Retrieval(),
    DataLoader(data, batch_size=100, sampler=sampler),
    DataLoader(test_data, batch_size=len(test_data)),
)
recall = trainer.callback_metrics["recall"]
print(f"Recall@1 on unseen classes: {100 * recall:.1f}%")
