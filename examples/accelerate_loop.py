"""A loop with Hugging Face Accelerate: prepare the loss with the model. On one device or several:

pip install accelerate && python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader, TensorDataset
from trainer import icons
from trainer.evaluate import apply, recall_at_k
from trainer.network import Network

from s2sd_pml import S2SDLoss  # S2SD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(0)  # the sampler draws the same on all processes
    seen, unseen = icons.split(icons.load())
    size = 128 // accelerator.num_processes
    sampler = MPerClassSampler(seen.labels, m=4, batch_size=size, length_before_new_iter=1600)
    data = TensorDataset(seen.images, seen.labels)
    loader = DataLoader(data, batch_size=size, sampler=sampler, drop_last=True)

    model = Network(embedding_size=16)
    loss_func = S2SDLoss(  # S2SD
        losses.MultiSimilarityLoss(2, 50, 0.5),
        miners.MultiSimilarityMiner(0.1),
        embedder=model.embedder,  # S2SD
        head_dims=(256, 512),  # S2SD
        distill_weight=5,  # S2SD
        feature_distill_weight=0,  # S2SD
        gather_distributed=True,  # the batch is that of all processes together
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_func.add_to(optimizer)  # S2SD
    model, loss_func, optimizer, loader = accelerator.prepare(model, loss_func, optimizer, loader)

    for epoch in range(args.epochs):
        for images, labels in loader:
            loss = loss_func(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    deployed = accelerator.unwrap_model(model)
    recall = recall_at_k(apply(deployed, unseen.images.to(accelerator.device)), unseen.labels)
    accelerator.print(f"Recall@1 on unseen classes: {100 * recall['Recall@1']:.1f}%")


if __name__ == "__main__":
    main()
