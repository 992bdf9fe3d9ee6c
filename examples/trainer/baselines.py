"""Alternatives to S2SD: PCA of large embeddings, Matryoshka losses, a teacher trained first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from s2sd_pml import clone_loss

from . import export


class MatryoshkaLoss(nn.Module):
    """The mean of a loss on the first 8, 16, ... dimensions of the embeddings and on all.

    Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022.
    """

    def __init__(
        self, loss: nn.Module, miner: nn.Module | None, size: int, sizes: Sequence[int]
    ) -> None:
        super().__init__()
        if wrong := [k for k in sizes if k >= size]:
            raise ValueError(f"--matryoshka-dims {wrong[0]} is not below --embedding-size {size}")
        self.sizes = [*sizes, size]
        self.losses = nn.ModuleList([*(clone_loss(loss, k) for k in sizes), loss])
        self.miner = miner

    def forward(self, embeddings: Tensor, labels: Tensor, _: object = None) -> Tensor:
        values = []
        for size, loss in zip(self.sizes, self.losses, strict=True):
            first = embeddings[:, :size]
            values.append(loss(first, labels, self.miner(first, labels) if self.miner else None))
        return torch.stack(values).mean()


def principal(fitted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of some rows and their principal directions, the strongest first, as columns."""
    mean = fitted.mean(dim=0)
    return mean, torch.linalg.svd(fitted - mean, full_matrices=False)[2].T


def teacher(path: Path, device: str) -> nn.Module:
    """A trained network, of ``--export``, that is not trained further."""
    return export.load(path).to(device).requires_grad_(False)
