"""Augmentation of a batch held in memory; every image by random numbers of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

AFFINE = 6  # random numbers of an affine transform


def uniform(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers (B, count) in -1 to 1, a row for every seed."""
    generator = torch.Generator()
    rows = [torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds]
    return 2 * torch.stack(rows) - 1


def affine(
    images: Tensor,
    numbers: Tensor,
    degrees: float = 10.0,
    scale: float = 0.15,
    shear: float = 0.1,
    shift: float = 0.1,
) -> Tensor:
    """Mild rotation, scaling, shear and shift of images (B, C, H, W), by numbers (B, 6).

    No flips: drawings have a direction. What comes in at the border is 0.
    """
    ranges = torch.tensor([math.radians(degrees), scale, scale, shear, shift, shift])
    angle, log_x, log_y, shear_x, dx, dy = (numbers * ranges).unbind(dim=1)
    cos, sin, sx, sy = angle.cos(), angle.sin(), log_x.exp(), log_y.exp()
    rows = [
        torch.stack([sx * cos, sx * (shear_x * cos - sin), dx], dim=1),
        torch.stack([sy * sin, sy * (shear_x * sin + cos), dy], dim=1),
    ]
    matrices = torch.stack(rows, dim=1).to(images.device)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
