"""A pretrained backbone of timm: its pooled features feed a new embedder and the heads.

    pip install timm && python examples/timm_backbone.py --backbone resnet50
    python examples/timm_backbone.py --variant msdfa   # heads on average + max pooling of the map

Frozen batch norm, Adam at 1e-5 and batches of 112 with 2 per class are as in the paper. icons-400
stands in for your images: give ``--size 224`` and your own data set for the paper's.
"""

from __future__ import annotations

import argparse

import timm
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer import icons
from trainer.evaluate import apply, recall_at_k

from s2sd_pml import S2SDLoss  # S2SD


class Model(nn.Module):
    """Images (B, 1, 32, 32) -> RGB of ``size`` -> map -> mean -> embeddings (B, D)."""

    def __init__(self, backbone: str, embedding_size: int, size: int, pretrained: bool) -> None:
        super().__init__()
        self.size = size
        self.trunk = timm.create_model(backbone, pretrained, num_classes=0, global_pool="")
        with torch.no_grad():
            width = self.trunk.eval()(torch.zeros(1, 3, size, size)).shape[1]
        self.embedder = nn.Linear(width, embedding_size)
        config = self.trunk.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def train(self, mode: bool = True) -> Model:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        images = nn.functional.interpolate(1 - images, self.size, mode="bilinear")
        feature_map = self.trunk((images - self.mean) / self.std)
        embeddings: Tensor = self.embedder(feature_map.mean(dim=(2, 3)))
        return embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--variant", choices=["dsd", "msd", "msdf", "msdfa"], default="msdf")
    parser.add_argument("--embedding-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--not-pretrained", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    seen, unseen = icons.split(icons.load())
    model = Model(args.backbone, args.embedding_size, args.size, not args.not_pretrained)
    loss_func = getattr(S2SDLoss, args.variant)(  # S2SD
        losses.MultiSimilarityLoss(2, 40, 0.5),
        miners.MultiSimilarityMiner(0.1),
        trunk=model.trunk,  # S2SD: its output is the features, a map
        feature_dim=model.embedder.in_features,  # S2SD
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=4e-4)
    loss_func.add_to(optimizer)  # S2SD

    batch = 112
    sampler = MPerClassSampler(seen.labels, 2, batch, length_before_new_iter=batch * args.steps)
    data = TensorDataset(seen.images, seen.labels)
    print(f"Recall@1 before training: {100 * recall(model, unseen):.1f}%")
    for images, labels in DataLoader(data, batch_size=batch, sampler=sampler, drop_last=True):
        loss = loss_func(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"Recall@1 on unseen classes: {100 * recall(model, unseen):.1f}%")


def recall(model: Model, data: icons.Icons) -> float:
    return recall_at_k(apply(model, data.images), data.labels)["Recall@1"]


if __name__ == "__main__":
    main()
