"""A plain PyTorch loop. The lines marked S2SD are what it adds to PML.

pip install s2sd-pml && python plain_loop.py
"""

import torch
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


# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5
data = TensorDataset(images[seen], labels[seen])
sampler = MPerClassSampler(labels[seen], m=20, length_before_new_iter=900)
loader = DataLoader(data, batch_size=100, sampler=sampler)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = Model().to(device)
# was: loss_func = losses.MultiSimilarityLoss()
# was: miner = miners.MultiSimilarityMiner()
loss_func = S2SDLoss(  # S2SD
    losses.MultiSimilarityLoss(),
    miners.MultiSimilarityMiner(),  # S2SD: it mines in every space
    embedder=model.fc,  # S2SD: the module whose input is the features
    **S2SDLoss.recipe("from-scratch"),  # S2SD: not if pretrained
).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loss_func.add_to(optimizer)  # S2SD: the heads are trained too

for epoch in range(20):
    for x, y in loader:
        embeddings, y = model(x.to(device)), y.to(device)
        # was: loss = loss_func(embeddings, y, miner(embeddings, y))
        loss = loss_func(embeddings, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

# The deployed model is the same as before: it has no auxiliary heads.
with torch.no_grad():
    embeddings = model.eval()(images[unseen].to(device)).cpu()
embeddings = nn.functional.normalize(embeddings)
nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(dim=1)
hits = labels[unseen][nearest] == labels[unseen]
print(f"Recall@1 on unseen classes: {100 * hits.float().mean():.1f}%")
