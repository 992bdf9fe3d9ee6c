"""icons-400: 400 concepts, each drawn by 8 icon families; 200 classes to train, 200 unseen.

``build_icons400.py --others`` makes other files of the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augment import AFFINE, affine, uniform

PATH = Path(__file__).parents[1] / "data" / "icons400.npz"


class Icons(NamedTuple):
    """Images (N, 1, 32, 32) with ink 1 on background 0, labels (N,), a name for every label."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def classes(self, first: int, last: int) -> Icons:
        """The classes from ``first`` up to, not including, ``last``, with labels from 0."""
        rows = (self.labels >= first) & (self.labels < last)
        return Icons(self.images[rows], self.labels[rows] - first, self.names[first:last])


def load(path: Path = PATH) -> Icons:
    """All classes of a file."""
    with np.load(path) as data:
        packed, labels, names = data["images"], data["labels"], data["names"]
    pixels = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, 1, 32, 32)
    return Icons(torch.from_numpy(pixels).float() / 15, torch.from_numpy(labels), names.tolist())


def split(icons: Icons) -> tuple[Icons, Icons]:
    """Training set and test set: the first and the second half of the classes."""
    half = len(icons.names) // 2
    return icons.classes(0, half), icons.classes(half, len(icons.names))


def prepare(images: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """As they are, or distorted to train with."""
    return images if seeds is None else affine(images, uniform(seeds, AFFINE))
