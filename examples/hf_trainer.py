"""Hugging Face's Trainer. The loss is a part of the model, so its heads are
trained, saved and resumed with it. The lines marked S2SD are new.

pip install s2sd-pml transformers accelerate && python hf_trainer.py
"""

import torch
from pytorch_metric_learning import losses, miners
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

from s2sd_pml import S2SDLoss  # S2SD


class Retrieval(nn.Module):
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

    def forward(self, images, labels):
        embeddings = self.fc(self.trunk(images))
        # was: pairs = self.miner(embeddings, labels)
        # was: loss = self.loss_func(embeddings, labels, pairs)
        loss = self.loss_func(embeddings, labels)
        return {"loss": loss, "embeddings": embeddings}


def recall(prediction):
    """Recall@1 of each image among the others."""
    z = nn.functional.normalize(torch.tensor(prediction.predictions))
    labels = torch.tensor(prediction.label_ids)
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(dim=1)
    return {"recall": (labels[nearest] == labels).float().mean().item()}


# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
rows = [
    {"images": image, "labels": int(label)}
    for image, label in zip(images, digits.target, strict=True)
]
seen = [row for row in rows if row["labels"] < 5]
unseen = [row for row in rows if row["labels"] >= 5]

torch.manual_seed(0)
trainer = Trainer(
    Retrieval(),
    TrainingArguments(
        "hf_trainer",
        num_train_epochs=20,
        per_device_train_batch_size=100,
        per_device_eval_batch_size=100,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
    ),
    train_dataset=seen,
    eval_dataset=unseen,
    compute_metrics=recall,
)
trainer.train()  # resume_from_checkpoint=True restores the heads as well
reached = trainer.evaluate()["eval_recall"]
print(f"Recall@1 on unseen classes: {100 * reached:.1f}%")
