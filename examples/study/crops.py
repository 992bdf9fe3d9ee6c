"""The augmented images of a run's first steps, cropped beforehand by several processes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from trainer import images, options, training
from trainer.images import InMemory, Split

PARTS = 64  # steps that a process crops at a time
KEY = ("dataset", "root", "image_size", "validation", "validation_share", "batch_size", "per_class")


class Crops(NamedTuple):
    """The augmented images of the first steps of some runs."""

    args: Any  # of one of these runs
    steps: int
    path: Path

    @property
    def ready(self) -> bool:
        return self.path.with_suffix(".ready").exists()


def crops_name(args: Any) -> str:
    """Runs with the same name see the same batches."""
    values = [getattr(args, name) for name in (*KEY, "steps_per_epoch", "accumulate", "seed")]
    return "-".join(str(value).replace("/", "_") for value in values)


@functools.cache
def load(argv: tuple[str, ...]) -> Split:
    """The data set of some flags."""
    args = options.parse(options.parser(), list(argv))
    return training.prepare(args)[0]


def data_flags(args: Any) -> tuple[str, ...]:
    """Those that choose the data."""
    flags = ["--dataset", args.dataset, "--validation-share", str(args.validation_share)]
    flags += ["--root", str(args.root)] if args.root else []
    flags += ["--image-size", str(args.image_size)] + (["--validation"] if args.validation else [])
    return (*flags, "--batch-size", str(args.batch_size), "--device", "cpu")


def crop(crops: Crops, first: int) -> None:
    """The images of some steps."""
    torch.set_num_threads(1)
    split = load(data_flags(crops.args))
    images.Files.decoded = staticmethod(DECODED)  # every file once
    last = min(first + PARTS, crops.steps)
    batches = training.make_batches(crops.args, split.train).between(first, last)
    memory = np.load(crops.path, mmap_mode="r+")
    for step, key in enumerate(batches, first):
        memory[step] = split.train[key][0].numpy()


DECODED = functools.cache(images.Files.decoded)
LABELS: dict[Path, Tensor] = {}


def labels_of(crops: Crops) -> Tensor:
    """The labels of all steps, (steps, B)."""
    if crops.path in LABELS:
        return LABELS[crops.path]
    train_images = load(data_flags(crops.args)).train
    batches = training.make_batches(crops.args, train_images).between(0, crops.steps)
    rows_of_steps = [torch.as_tensor(rows) for rows, _ in batches]
    LABELS[crops.path] = torch.stack([train_images.labels[rows] for rows in rows_of_steps])
    return LABELS[crops.path]


def make_crops(crops: Crops, pool: Any) -> list[Any]:
    """Start cropping; the results to wait for."""
    split = load(data_flags(crops.args))
    ((rows, seeds),) = training.make_batches(crops.args, split.train).between(0, 1)
    one = split.train[rows, seeds][0].numpy()
    np.lib.format.open_memmap(crops.path, "w+", one.dtype, (crops.steps, *one.shape)).flush()
    return [pool.apply_async(crop, (crops, first)) for first in range(0, crops.steps, PARTS)]


def in_memory(split: Split, device: str) -> Split:
    """The images to test with, decoded once."""
    parts = []
    for part in split[:3]:
        if part is None:
            parts.append(None)
            continue
        stored = torch.cat([batch for batch, _ in part.loader(0)]).to(device)
        held = InMemory(stored, part.labels, part.names, lambda x, seeds: x)
        held.paths = getattr(part, "paths", [])  # for the fingerprint
        parts.append(held)
    return split._replace(train=parts[0], test=parts[1], gallery=parts[2])
