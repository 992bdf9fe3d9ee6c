"""Hugging Face's Trainer. The loss is a part of the model, optimized, saved and resumed with it.

pip install transformers accelerate && python examples/hf_trainer.py
"""

from __future__ import annotations

import argparse

import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from s2sd_pml import S2SDLoss  # S2SD


def samples(classes: range) -> list[dict[str, Tensor]]:
    """Twenty vectors of each class: what tells classes apart lies in 8 of 24 hidden directions."""
    draw = torch.Generator().manual_seed(classes.start)
    labels = torch.tensor([label for label in classes for _ in range(20)])
    own = torch.randn(classes.stop, 8, generator=draw)[labels]
    hidden = torch.cat([own, torch.randn(len(labels), 16, generator=draw)], dim=1)
    inputs = hidden @ torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


class Retrieval(nn.Module):
    """Vectors to embeddings. Deploy ``trunk`` and ``embedder``: the loss is for training."""

    def __init__(self, embedding_size: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.embedder = nn.Linear(128, embedding_size)
        self.loss_func = S2SDLoss(  # S2SD
            losses.MultiSimilarityLoss(2, 50, 0.5),
            miners.MultiSimilarityMiner(0.1),
            embedder=self.embedder,  # S2SD
            head_dims=(64, 128),  # S2SD
            distill_weight=5,  # S2SD
            feature_distill_weight=0,  # S2SD
        )

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeddings = self.embedder(self.trunk(inputs))
        return {"loss": self.loss_func(embeddings, labels), "embeddings": embeddings}


def recall(prediction: EvalPrediction) -> dict[str, float]:
    """Recall@1 among the others."""
    embeddings = nn.functional.normalize(torch.as_tensor(prediction.predictions))
    labels = torch.as_tensor(prediction.label_ids)
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(dim=1)
    return {"recall@1": (labels[nearest] == labels).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", default="hf_trainer")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    args = parser.parse_args()
    torch.manual_seed(0)
    trainer = Trainer(
        Retrieval(),
        TrainingArguments(
            args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=100,
            per_device_eval_batch_size=100,
            learning_rate=2e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=samples(range(60)),
        eval_dataset=samples(range(60, 90)),
        compute_metrics=recall,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    print(f"Recall@1 on unseen classes: {100 * trainer.evaluate()['eval_recall@1']:.1f}%")


if __name__ == "__main__":
    main()
