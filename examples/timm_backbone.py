"""A backbone of timm, fine-tuned as in the paper: frozen batch norm, heads
on average + max pooling (MSDFA). The lines marked S2SD are new.

pip install s2sd-pml timm && python timm_backbone.py
"""

import argparse

import timm
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2sd_pml import S2SDLoss  # S2SD

parser = argparse.ArgumentParser()
parser.add_argument("--backbone", default="resnet18")
parser.add_argument("--no-weights", action="store_true")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--lr", type=float, default=3e-5, help="paper: 1e-5")
args = parser.parse_args()


class Model(nn.Module):
    """Images (B, 3, H, W) -> map -> mean (B, F) -> embeddings (B, 128)."""

    def __init__(self):
        super().__init__()
        pretrained = not args.no_weights
        wanted = {"num_classes": 0, "global_pool": ""}  # the map
        self.trunk = timm.create_model(args.backbone, pretrained, **wanted)
        self.fc = nn.Linear(self.trunk.head_hidden_size, 128)
        config = self.trunk.pretrained_cfg
        self.mean = torch.tensor(config["mean"]).view(3, 1, 1)
        self.std = torch.tensor(config["std"]).view(3, 1, 1)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images):
        maps = self.trunk((images - self.mean) / self.std)
        return self.fc(maps.mean(dim=(2, 3)))


# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
images = nn.functional.interpolate(images, 64).expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5
data, size = TensorDataset(images[seen], labels[seen]), 40 * args.steps
sampler = MPerClassSampler(labels[seen], m=8, length_before_new_iter=size)
loader = DataLoader(data, batch_size=40, sampler=sampler)

torch.manual_seed(0)
model = Model()
# was: loss_func = losses.MultiSimilarityLoss()
# was: miner = miners.MultiSimilarityMiner()
loss_func = S2SDLoss.msdfa(  # S2SD
    losses.MultiSimilarityLoss(),
    miners.MultiSimilarityMiner(),  # S2SD: it mines in every space
    trunk=model.trunk,  # S2SD: its output is the features, a map
    feature_dim=model.fc.in_features,  # S2SD
)
optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=4e-4)
loss_func.add_to(optimizer)  # S2SD: the heads, without weight decay

for x, y in loader:
    embeddings = model(x)
    # was: loss = loss_func(embeddings, y, miner(embeddings, y))
    loss = loss_func(embeddings, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# The deployed model is the same as before: it has no auxiliary heads.
model.eval()
with torch.no_grad():
    z = torch.cat([model(x) for x in images[unseen].split(100)])
z = nn.functional.normalize(z)
nearest = (z @ z.T).fill_diagonal_(-1).argmax(dim=1)
hits = labels[unseen][nearest] == labels[unseen]
print(f"Recall@1 on unseen classes: {100 * hits.float().mean():.1f}%")
