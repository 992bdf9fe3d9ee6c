"""A network with the two parts that metric learning speaks of: a trunk and an embedder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import backbones


class Network(nn.Module):
    """Images (B, C, H, W) -> trunk: map (B, F, h, w) -> mean -> embedder: (B, D).

    The embeddings are not normalised: PML's losses do that by their own distance.
    """

    def __init__(
        self,
        embedding_size: int,
        backbone: str = "cnn",
        *,
        channels: int = 1,
        image_size: int = 32,
        pretrained: bool = False,
        weights: Path | None = None,
        freeze_bn: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.description = {
            "embedding_size": embedding_size,
            "backbone": backbone,
            "channels": channels,
            "image_size": image_size,
        }
        self.freeze_bn = freeze_bn
        self.trunk = backbones.make(backbone, pretrained, weights, channels)
        self.embedder = nn.Linear(backbones.width(self.trunk, channels, image_size), embedding_size)
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions
        self.train()  # with what is frozen

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self.freeze_bn:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # statistics of its pretraining; its scale and shift do learn
        return self

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.embedder(pool(self.trunk(images)))
        return embeddings


def pool(features: Tensor) -> Tensor:
    """The mean of a map (B, F, h, w); features that are pooled already stay."""
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features
