"""What goes with S2SD or instead of it: outside teachers, and the directions of a PCA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import backbones, export
from .network import pool


def principal(fitted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of some rows and their principal directions, the strongest first, as columns."""
    mean = fitted.mean(dim=0)
    return mean, torch.linalg.svd(fitted - mean, full_matrices=False)[2].T


class Frozen(nn.Module):
    """A pretrained trunk as a teacher: images to pooled features, never trained."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.trunk = backbones.make(backbone, pretrained=True, weights=None, channels=3)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return pool(self.trunk(images))


def teacher(name: str, device: str) -> nn.Module:
    """An outside teacher: a file of ``--export``, or a backbone with its pretrained weights."""
    try:
        frozen = export.load(Path(name)) if Path(name).exists() else Frozen(name)
    except ValueError as error:
        raise ValueError(
            f"--teacher {name} is no file of --export and no pretrained backbone: {error}"
        ) from error
    return frozen.to(device).requires_grad_(False)
