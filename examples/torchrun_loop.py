"""DistributedDataParallel under torchrun: wrap the model and the loss.
The lines marked S2SD are new.

pip install s2sd-pml && torchrun --nproc_per_node=2 torchrun_loop.py
"""

import gc

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from s2sd_pml import S2SDLoss  # S2SD


class Model(nn.Module):
    """Images (B, 1, 8, 8) -> features (B, 128) -> embeddings (B, 8)."""

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

    def forward(self, images):
        return self.fc(self.trunk(images))


cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = f"cuda:{rank % torch.cuda.device_count()}" if cuda else "cpu"

# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5
data, size = TensorDataset(images[seen], labels[seen]), 900 // world
common_functions.NUMPY_RANDOM.seed(rank)  # every rank draws its own
sampler = MPerClassSampler(labels[seen], 10, length_before_new_iter=size)
loader = DataLoader(data, batch_size=100 // world, sampler=sampler)

torch.manual_seed(0)  # the model is the same on all ranks
model = Model().to(device)
# was: loss_func = losses.MultiSimilarityLoss()
# was: miner = miners.MultiSimilarityMiner()
loss_func = S2SDLoss(  # S2SD
    losses.MultiSimilarityLoss(),
    miners.MultiSimilarityMiner(),  # S2SD: it mines in every space
    embedder=model.fc,  # S2SD: the module whose input is the features
    gather_distributed=True,  # S2SD: one batch over all ranks
    **S2SDLoss.recipe("from-scratch"),  # S2SD: not if pretrained
).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loss_func.add_to(optimizer)  # S2SD: the heads are trained too
loss_func = DistributedDataParallel(loss_func)  # S2SD
model = DistributedDataParallel(model)

for epoch in range(20):
    for x, y in loader:
        # was: loss = loss_func(z, y, miner(z, y)), with z = model(x)
        loss = loss_func(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

if rank == 0:
    with torch.no_grad():
        z = model.module.eval()(images[unseen].to(device)).cpu()
    z = nn.functional.normalize(z)
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(dim=1)
    hits = labels[unseen][nearest] == labels[unseen]
    print(f"Recall@1 on unseen classes: {100 * hits.float().mean():.1f}%")
del model, loss_func
gc.collect()  # DDP, which holds itself, must go before its process group
dist.destroy_process_group()
