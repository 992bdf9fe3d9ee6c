"""A loop with Accelerate, on one device or several: prepare the loss with
the model. The lines marked S2SD are new.

pip install s2sd-pml accelerate && python accelerate_loop.py
accelerate launch --cpu --num_processes 2 accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from sklearn.datasets import load_digits
from torch import nn
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


accelerator = Accelerator()
set_seed(0)  # the sampler draws the same on all processes
batch_size = 100 // accelerator.num_processes

# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5
data = TensorDataset(images[seen], labels[seen])
sampler = MPerClassSampler(labels[seen], m=10, length_before_new_iter=900)
loader = DataLoader(data, batch_size=batch_size, sampler=sampler)

model = Model()
# was: loss_func = losses.MultiSimilarityLoss()
# was: miner = miners.MultiSimilarityMiner()
loss_func = S2SDLoss(  # S2SD
    losses.MultiSimilarityLoss(),
    miners.MultiSimilarityMiner(),  # S2SD: it mines in every space
    embedder=model.fc,  # S2SD: the module whose input is the features
    gather_distributed=True,  # S2SD: one batch over all processes
    **S2SDLoss.recipe("from-scratch"),  # S2SD: not if pretrained
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loss_func.add_to(optimizer)  # S2SD: the heads are trained too
loss_func = accelerator.prepare(loss_func)  # S2SD
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(20):
    for x, y in loader:
        # was: loss = loss_func(z, y, miner(z, y)), with z = model(x)
        loss = loss_func(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

# The deployed model is the same as before: it has no auxiliary heads.
deployed = accelerator.unwrap_model(model).eval()
with torch.no_grad():
    z = deployed(images[unseen].to(accelerator.device)).cpu()
z = nn.functional.normalize(z)
nearest = (z @ z.T).fill_diagonal_(-1).argmax(dim=1)
hits = labels[unseen][nearest] == labels[unseen]
recall = 100 * hits.float().mean()
accelerator.print(f"Recall@1 on unseen classes: {recall:.1f}%")
