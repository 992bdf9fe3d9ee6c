"""Labelled images behind one interface, whatever they are stored as, and the batches of a run.

``data[rows, seeds]`` are the images (B, C, H, W), in 0 to 1 or as bytes, and labels (B,) of some
rows: one seed a row for a training image, augmented by it, or None for an image to test with. A
batch is thus a function of numbers alone: no worker process, rank or resumed run changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import ranks, stop

Key = tuple[Sequence[int], "Sequence[int] | None"]
KS = (1, 2, 4, 8)  # of Recall@K, by custom
BATCH = 256  # images at a time without gradients


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Labels (N,) from 0, a name for every label, and the images by row."""

    def __init__(self, labels: Tensor, names: list[str]) -> None:
        self.labels, self.names = labels, names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        rows, seeds = key
        return self.images(rows, seeds), self.labels[torch.as_tensor(rows)]

    def images(self, rows: Sequence[int], seeds: Sequence[int] | None) -> Tensor:
        """Images (B, C, H, W) in 0 to 1, or as bytes."""
        raise NotImplementedError

    def rows(self, rows: Tensor, labels: Tensor, names: list[str]) -> Images:
        """The same images, of some rows, under other labels."""
        raise NotImplementedError

    def classes(self, first: int, last: int) -> Images:
        """The classes from ``first`` up to, not including, ``last``, with labels from 0."""
        rows = ((self.labels >= first) & (self.labels < last)).nonzero().squeeze(1)
        return self.rows(rows, self.labels[rows] - first, self.names[first:last])

    def picture(self, row: int) -> np.ndarray:
        """An image to look at, (H, W, 3) in 0 to 1."""
        image = self.images([row], None)[0]
        image = image if image.is_floating_point() else image.float() / 255
        image = 1 - image if len(image) == 1 else image  # ink on paper
        return image.expand(3, -1, -1).permute(1, 2, 0).numpy()

    def loader(self, workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        """All rows in order, to test with."""
        parts = np.array_split(np.arange(len(self)), max(1, -(-len(self) // BATCH)))
        keys = [(part.tolist(), None) for part in parts]
        return DataLoader(
            self,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            generator=torch.Generator(),  # the global one is left alone
            worker_init_fn=stop.ignore,
        )


class InMemory(Images):
    """Images held as one tensor (N, ...); ``prepare`` makes what the network sees."""

    def __init__(
        self,
        stored: Tensor,
        labels: Tensor,
        names: list[str],
        prepare: Callable[[Tensor, Sequence[int] | None], Tensor],
    ) -> None:
        super().__init__(labels, names)
        self.stored, self.prepare = stored, prepare

    def images(self, rows: Sequence[int], seeds: Sequence[int] | None) -> Tensor:
        return self.prepare(self.stored[torch.as_tensor(rows)], seeds)

    def rows(self, rows: Tensor, labels: Tensor, names: list[str]) -> Images:
        return InMemory(self.stored[rows], labels, names, self.prepare)


class Files(Images):
    """Image files, read when they are asked for.

    To train with: a random crop of 8% to 100% of the area, in a ratio of 3:4 to 4:3, scaled to
    ``size``, and mirrored half of the time. To test with: the middle square of the image, 7/8 of
    its shorter side, scaled to ``size`` (at 224 pixels the usual 256 and centre crop).
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, names: list[str], size: int) -> None:
        super().__init__(labels, names)
        self.paths, self.size = list(paths), size

    def images(self, rows: Sequence[int], seeds: Sequence[int] | None) -> Tensor:
        images = [
            self._read(self.paths[row], None if seeds is None else seeds[i])
            for i, row in enumerate(rows)
        ]
        return torch.stack(images)

    def rows(self, rows: Tensor, labels: Tensor, names: list[str]) -> Images:
        return Files([self.paths[row] for row in rows.tolist()], labels, names, self.size)

    def _read(self, path: Path, seed: int | None) -> Tensor:
        size, image = (self.size, self.size), self.decoded(path)
        if seed is None:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR, bleed=1 / 16)
        else:
            random = np.random.default_rng(seed)
            box = crop(random, *image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=2.0)
            if random.random() < 0.5:
                image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # bytes: workers send them

    @staticmethod
    def decoded(path: Path) -> Image.Image:
        """The whole image."""
        try:
            with Image.open(path) as file:
                return coloured(file)
        except Exception as error:  # Pillow raises many
            raise OSError(f"{path} cannot be read as an image: {error}") from error


def check(*parts: Images) -> None:
    """Open every file, without reading it whole: what is no image is told before training."""
    for part in parts:
        for path in getattr(part, "paths", ()):
            try:
                Image.open(path).close()
            except Exception as error:
                raise ValueError(f"{path} cannot be read as an image: {error}") from error


def coloured(image: Image.Image) -> Image.Image:
    """Upright and RGB: turned as its camera says, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits of grey
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def crop(random: np.random.Generator, width: int, height: int) -> tuple[float, ...]:
    """A random box (left, top, right, bottom); the whole image if ten tries do not fit.

    The crop of Inception's training (Szegedy et al., CVPR 2015), as the paper's trunks had it.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


class Split(NamedTuple):
    """Images to train with and images to test with; without a gallery the tests are their own."""

    train: Images
    test: Images
    gallery: Images | None = None
    ks: tuple[int, ...] = KS  # of Recall@K, by the custom of the data set

    def held_out(self, share: float) -> Split:
        """The last of the training classes in the place of the test classes, to choose by."""
        classes = len(self.train.names)
        kept = classes - round(share * classes)
        if not 1 < kept < classes - 1:
            raise ValueError(
                f"--validation-share {share} of {classes} training classes leaves {kept} to train "
                f"and {classes - kept} to choose by: two of each are needed"
            )
        return Split(self.train.classes(0, kept), self.train.classes(kept, classes))


class Batches(Sampler[Key]):
    """Keys of this rank's part of every batch from step ``start`` on, ``per_class`` of each class.

    A step's batch depends on the seed and the step alone, not on what was drawn before.
    """

    def __init__(
        self, labels: Tensor, batch_size: int, per_class: int, steps: int, seed: int
    ) -> None:
        self.labels, self.batch_size, self.per_class = labels.tolist(), batch_size, per_class
        self.steps, self.seed = steps, seed  # steps of an epoch
        self.start, self.stop = 0, steps
        classes, needed = len(set(self.labels)), batch_size // per_class
        fits = per_class * max(1, min(needed, classes))
        fix = f"use --batch-size {fits} --per-class {per_class}"
        if batch_size % per_class:
            raise ValueError(
                f"--batch-size {batch_size} is no multiple of --per-class {per_class}: {fix}"
            )
        if classes < needed:
            raise ValueError(
                f"--batch-size {batch_size} with --per-class {per_class} needs {needed} classes, "
                f"and there are {classes} to train with: {fix}"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Key]:
        for rows, seeds in self.whole():
            yield ranks.own(rows).tolist(), ranks.own(seeds).tolist()

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and seeds of every batch, of all ranks."""
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.steps)
            if step == self.start or place == 0:
                random = np.random.RandomState([self.seed, epoch])
                rows = self._epoch(random)
                seeds = random.randint(2**31, size=(self.steps, self.batch_size))
            batch = slice(place * self.batch_size, (place + 1) * self.batch_size)
            yield rows[batch], torch.from_numpy(seeds[place])

    def _epoch(self, random: np.random.RandomState) -> Tensor:
        length = self.batch_size * self.steps
        sampler = MPerClassSampler(self.labels, self.per_class, self.batch_size, length)
        before, common_functions.NUMPY_RANDOM = common_functions.NUMPY_RANDOM, random
        try:  # PML's samplers draw from that
            return torch.tensor(list(sampler))
        finally:
            common_functions.NUMPY_RANDOM = before

    def between(self, start: int, stop: int) -> Batches:
        """The batches of these steps."""
        self.start, self.stop = start, stop
        return self
