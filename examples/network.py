"""A small convolutional network with the two parts that metric learning speaks of."""

from __future__ import annotations

import torch
from ranks import BatchNorm2d
from torch import Tensor, nn


def block(inputs: int, outputs: int, *, pool: bool = True) -> nn.Sequential:
    """Convolution, max pooling by two if asked, batch norm, ReLU: pooled early, for speed."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2) if pool else nn.Identity(),
        BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Network(nn.Module):
    """Images (B, 1, 32, 32) -> trunk: map (B, 128, 4, 4) -> mean -> embedder: (B, D).

    The embeddings are not normalised: PML's losses do that by their own distance.
    """

    def __init__(self, embedding_size: int, width: int = 16) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.width = width
        self.trunk = nn.Sequential(
            block(1, width),
            block(width, 2 * width),
            block(2 * width, 4 * width),
            block(4 * width, 8 * width, pool=False),
        )
        self.embedder = nn.Linear(8 * width, embedding_size)
        self.to(memory_format=torch.channels_last)  # the faster layout on CPU

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images).mean(dim=(2, 3))
        embeddings: Tensor = self.embedder(features)
        return embeddings
