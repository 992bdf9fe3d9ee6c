"""A plain PyTorch loop. The lines marked S2SD are all that it adds to a loop with PML.

python examples/plain_loop.py
"""

from __future__ import annotations

import argparse
import sys

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader, TensorDataset
from trainer import icons
from trainer.augment import RandomAffine
from trainer.evaluate import apply, recall_at_k
from trainer.network import Network

from s2sd_pml import S2SDLoss  # S2SD


def train(embedding_size: int = 16, epochs: int = 10) -> Network:
    """Train on half of the classes of icons-400."""
    seen, _ = icons.split(icons.load())
    sampler = MPerClassSampler(seen.labels, m=4, batch_size=128, length_before_new_iter=1600)
    data = TensorDataset(seen.images, seen.labels)
    loader = DataLoader(data, batch_size=128, sampler=sampler, drop_last=True)
    augment = RandomAffine(seed=0)

    model = Network(embedding_size)
    loss_func = S2SDLoss(  # S2SD
        losses.MultiSimilarityLoss(2, 50, 0.5),
        miners.MultiSimilarityMiner(0.1),
        embedder=model.embedder,  # S2SD
        head_dims=(256, 512),  # S2SD
        distill_weight=5,  # S2SD
        feature_distill_weight=0,  # S2SD
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_func.add_to(optimizer)  # S2SD

    for epoch in range(epochs):
        for images, labels in loader:
            loss = loss_func(model(augment(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", file=sys.stderr)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    torch.manual_seed(0)
    model = train(epochs=parser.parse_args().epochs)
    _, unseen = icons.split(icons.load())
    recall = recall_at_k(apply(model, unseen.images), unseen.labels)
    print(f"Recall@1 on unseen classes: {100 * recall['Recall@1']:.1f}%")


if __name__ == "__main__":
    main()
