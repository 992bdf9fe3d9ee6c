"""A plain DistributedDataParallel loop: wrap the model and the loss.

torchrun --nproc_per_node=2 examples/torchrun_loop.py
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from trainer import icons
from trainer.evaluate import apply, recall_at_k
from trainer.network import Network

from s2sd_pml import S2SDLoss  # S2SD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else "cpu"

    torch.manual_seed(0)  # the model is the same on all ranks
    model = Network(embedding_size=16).to(device)
    loss_func = S2SDLoss(  # S2SD
        losses.MultiSimilarityLoss(2, 50, 0.5),
        miners.MultiSimilarityMiner(0.1),
        embedder=model.embedder,  # S2SD
        head_dims=(256, 512),  # S2SD
        distill_weight=5,  # S2SD
        feature_distill_weight=0,  # S2SD
        gather_distributed=True,  # the batch is that of all ranks together
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_func.add_to(optimizer)  # S2SD
    model, loss_func = DistributedDataParallel(model), DistributedDataParallel(loss_func)

    seen, unseen = icons.split(icons.load())
    common_functions.NUMPY_RANDOM.seed(rank)  # the batches are different ones
    size = 128 // world
    sampler = MPerClassSampler(
        seen.labels, m=4, batch_size=size, length_before_new_iter=1600 // world
    )
    data = TensorDataset(seen.images, seen.labels)
    loader = DataLoader(data, batch_size=size, sampler=sampler, drop_last=True)
    for epoch in range(args.epochs):
        for images, labels in loader:
            loss = loss_func(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    if rank == 0:
        recall = recall_at_k(apply(model.module, unseen.images.to(device)).cpu(), unseen.labels)
        print(f"Recall@1 on unseen classes: {100 * recall['Recall@1']:.1f}%")
    del model, loss_func
    gc.collect()  # DDP, which holds itself, must go before its process group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
