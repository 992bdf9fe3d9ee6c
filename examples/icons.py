"""icons-400: 400 concepts, each drawn by 8 icon families; 200 classes to train, 200 unseen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import Tensor

PATH = Path(__file__).parent / "data" / "icons400.npz"
TRAIN_CLASSES = 200
VALIDATION_CLASSES = 40  # the last of the training classes, held out on request


class Icons(NamedTuple):
    """Images (N, 1, 32, 32) with ink 1 on background 0, labels (N,), a name for every label."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def to(self, device: str) -> Icons:
        """The same on another device."""
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def classes(self, first: int, last: int) -> Icons:
        """The classes from ``first`` up to, not including, ``last``, with labels from 0."""
        rows = (self.labels >= first) & (self.labels < last)
        return Icons(self.images[rows], self.labels[rows] - first, self.names[first:last])


def load(path: Path = PATH) -> Icons:
    """All 400 classes."""
    with np.load(path) as data:
        packed, labels, names = data["images"], data["labels"], data["names"]
    pixels = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, 1, 32, 32)
    return Icons(torch.from_numpy(pixels).float() / 15, torch.from_numpy(labels), names.tolist())


def split(icons: Icons, validation: bool = False) -> tuple[Icons, Icons]:
    """Training set and evaluation set, with no class in common.

    Args:
        validation: evaluate on held-out training classes, to choose settings without a look at
            the test classes.
    """
    if validation:
        kept = TRAIN_CLASSES - VALIDATION_CLASSES
        return icons.classes(0, kept), icons.classes(kept, TRAIN_CLASSES)
    return icons.classes(0, TRAIN_CLASSES), icons.classes(TRAIN_CLASSES, len(icons.names))


class Batches:
    """Batches without end, ``per_class`` images of each class in one; an epoch has ``steps``.

    It draws from a generator of its own: what a loss draws does not change the batches.
    """

    def __init__(
        self, icons: Icons, batch_size: int, per_class: int, steps: int, seed: int
    ) -> None:
        self.icons = icons
        self.batch_size = batch_size
        self.sampler = MPerClassSampler(icons.labels, per_class, batch_size, batch_size * steps)
        self.random = np.random.RandomState(seed)
        self.left: list[int] = []  # rows of this epoch's batches to come

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self.left:
            common_functions.NUMPY_RANDOM = self.random  # what PML's samplers draw from
            self.left = list(self.sampler)
        rows, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        return self.icons.images[rows], self.icons.labels[rows]

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, and what the sampler makes the next one of."""
        return {
            "left": [int(row) for row in self.left],
            "classes": [int(label) for label in self.sampler.labels],  # it shuffles them in place
            "random": checkpoint.numpy_state(self.random),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left, self.sampler.labels = state["left"], state["classes"]
        self.random.set_state(state["random"])


class RandomAffine:
    """Mild rotation, scaling, shear and shift of a batch. No flips: icons have a direction."""

    def __init__(
        self,
        seed: int,
        degrees: float = 10.0,
        scale: float = 0.15,
        shear: float = 0.1,
        shift: float = 0.1,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.ranges = torch.tensor([math.radians(degrees), scale, scale, shear, shift, shift])

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), every image with a transform of its own."""
        uniform = 2 * torch.rand(len(images), len(self.ranges), generator=self.generator) - 1
        angle, log_x, log_y, shear, dx, dy = (uniform * self.ranges).unbind(dim=1)
        cos, sin, sx, sy = angle.cos(), angle.sin(), log_x.exp(), log_y.exp()
        rows = [
            torch.stack([sx * cos, sx * (shear * cos - sin), dx], dim=1),
            torch.stack([sy * sin, sy * (shear * sin + cos), dy], dim=1),
        ]
        affine = torch.stack(rows, dim=1).to(images.device)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of its generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
