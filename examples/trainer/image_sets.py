"""The data sets of the trainer by name, with the class splits of the literature.

================  =================================================================================
``icons400``      comes with the project: 400 classes of 8 drawings
``emoji``         fetched once with npm: some 1,600 classes of 4 to 9 drawings
``cub200``        CUB200-2011 as published: the first 100 classes train, the last 100 test
``cars196``       as published, or as PML downloads it: the first 98 classes train
``sop``           Stanford Online Products as published: 11,318 classes train, 11,316 test
``inshop``        In-Shop Clothes as published: 3,997 classes train; queries and a gallery
``folder``        a folder a class, in ``train`` and ``test``; else the first half of classes trains
``csv``           a table of path and label, and if you like of split: train, test, gallery
================  =================================================================================
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from zipfile import BadZipFile

import torch

from . import icons
from .images import Files, InMemory, Split

try:
    from pytorch_metric_learning import datasets
except ImportError:  # before version 2.9
    datasets = None

NUMBER = re.compile(r"^\d{5} ")
EXTENSIONS = set(".jpg .jpeg .png .bmp .gif .tif .tiff .webp .ppm .pgm".split())
Listed = list[tuple[Path, str]]  # image files with the name of their class


def load(args: argparse.Namespace) -> Split:
    """The data set that the flags name; with ``--validation`` no test class is in it."""
    split = SETS[args.dataset](args)
    return split.held_out(args.validation_share) if args.validation else split


def icons400(args: argparse.Namespace) -> Split:
    path = icons.PATH if args.root is None else _given(args)
    try:
        parts = icons.split(icons.load(path))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        raise ValueError(
            f"--root {path} is no file that build_icons400.py writes. For your own images name "
            "their form as well, such as --dataset folder"
        ) from None
    return Split(*(InMemory(p.images, p.labels, p.names, icons.prepare) for p in parts))


def emoji(args: argparse.Namespace) -> Split:
    from . import emoji_set

    whole = InMemory(*emoji_set.load(args.root), emoji_set.prepare)
    half = len(whole.names) // 2
    return Split(whole.classes(0, half), whole.classes(half, len(whole.names)))


def cub200(args: argparse.Namespace) -> Split:
    return _pml(args, "CUB", "CUB_200_2011/images.txt")


def cars196(args: argparse.Namespace) -> Split:
    if args.root and (args.root / "cars_annos.mat").exists():
        return _cars_as_published(args)
    return _pml(args, "Cars196", "names.csv")


def sop(args: argparse.Namespace) -> Split:
    split = _pml(args, "StanfordOnlineProducts", "Stanford_Online_Products/Ebay_train.txt")
    return split._replace(ks=(1, 10, 100, 1000))


def inshop(args: argparse.Namespace) -> Split:
    given = _given(args)
    lists = [given / folder / "list_eval_partition.txt" for folder in ("Eval", "Anno", ".")]
    path = next((p for p in lists if p.exists()), None)
    if path is None:
        raise ValueError(f"--root {given} has no Eval/list_eval_partition.txt: is it In-Shop?")
    images = given / "Img" if (given / "Img").is_dir() else given
    parts: dict[str, Listed] = {"train": [], "query": [], "gallery": []}
    for line in path.read_text().splitlines()[2:]:  # a count and a heading come first
        image, item, part = line.split()
        if part not in parts:
            raise ValueError(f"{path} has an image of part {part!r}, which is none of {[*parts]}")
        parts[part].append((images / image, item))
    split = _split(args, parts["train"], parts["query"], parts["gallery"])
    return split._replace(ks=(1, 10, 20, 30))


def folder(args: argparse.Namespace) -> Split:
    root = _given(args)
    parts = [(root / part).is_dir() for part in ("train", "test")]
    if any(parts) and not all(parts):
        raise ValueError(f"--root {root} has {'train' if parts[0] else 'test'} alone: name both")
    if all(parts):
        return _split(args, _folders(root / "train"), _folders(root / "test"))
    listed = _folders(root)
    direct = [p for p in root.iterdir() if p.suffix.lower() in EXTENSIONS]
    if not listed and direct:
        raise ValueError(
            f"--root {root} has {len(direct)} images itself: a folder a class is needed"
        )
    return _halves(args, listed)


def table(args: argparse.Namespace) -> Split:
    path = _given(args)
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
        rows = list(csv.DictReader(file))
    if not rows or not {"path", "label"} <= rows[0].keys():
        raise ValueError(f"--root {path} needs a first line with path,label and maybe split")
    for number, row in enumerate(rows, start=2):
        if None in row.values() or None in row:
            raise ValueError(f"{path}, line {number}: it has not as many cells as the first line")
    listed = [(path.parent / row["path"], row["label"]) for row in rows]
    if "split" not in rows[0]:
        return _halves(args, listed)
    parts: dict[str, Listed] = {"train": [], "test": [], "gallery": []}
    for number, (row, found) in enumerate(zip(rows, listed, strict=True), start=2):
        part = {"query": "test"}.get(row["split"], row["split"])
        if part not in parts:
            raise ValueError(f"{path}, line {number}: split={row['split']!r} is none of {[*parts]}")
        parts[part].append(found)
    return _split(args, *parts.values())


SETS: dict[str, Callable[[argparse.Namespace], Split]] = {
    "icons400": icons400,
    "emoji": emoji,
    "cub200": cub200,
    "cars196": cars196,
    "sop": sop,
    "inshop": inshop,
    "folder": folder,
    "csv": table,
}


def _given(args: argparse.Namespace) -> Path:
    """``--root``, which these data sets need."""
    if args.root is None:
        raise ValueError(f"--dataset {args.dataset} needs --root: where its files are")
    if not args.root.exists():
        raise ValueError(f"--root {args.root} does not exist")
    return Path(args.root)


def _pml(args: argparse.Namespace, name: str, inside: str) -> Split:
    """A data set that PML reads, from ``--root`` or the folder above it, which holds a file."""
    given = _given(args).resolve()
    if datasets is None:
        raise ValueError(f"--dataset {args.dataset} needs pytorch-metric-learning 2.9 or later")
    root = next((folder for folder in (given, given.parent) if (folder / inside).exists()), None)
    if root is None:
        raise ValueError(
            f"--root {given} has no {inside}. pytorch_metric_learning.datasets.{name}"
            "(FOLDER, download=True) fetches the data set"
        )
    parts = [getattr(datasets, name)(str(root), split=split) for split in ("train", "test")]
    train, test = (
        [
            (Path(p), _numbered(n, Path(p).parent.name))
            for p, n in zip(d.paths, d.labels, strict=True)
        ]
        for d in parts
    )
    return _split(args, train, test)


def _numbered(number: int, folder: str) -> str:
    """A class in the order of its number: "00103 Sayornis", of a folder "103.Sayornis"."""
    name = re.sub(r"^\d+\.", "", folder).removesuffix("_final").replace("_", " ")
    return f"{number:05d} {name}"


def _called(names: list[str]) -> list[str]:
    """Names without that number, unless several classes have the same."""
    plain = [NUMBER.sub("", name) for name in names]
    return plain if len(set(plain)) == len(plain) else [name.lstrip("0") for name in names]


def _cars_as_published(args: argparse.Namespace) -> Split:
    """cars_annos.mat and car_ims, which PML does not read."""
    from scipy.io import loadmat

    content = loadmat(args.root / "cars_annos.mat", squeeze_me=True)
    notes, called = content["annotations"], content["class_names"]
    names, classes = notes["relative_im_path"].tolist(), notes["class"].astype(int).tolist()
    every = [
        (args.root / name, _numbered(c, str(called[c - 1])))
        for name, c in zip(names, classes, strict=True)
    ]
    train = [item for item, c in zip(every, classes, strict=True) if c <= 98]
    return _split(args, train, [item for item, c in zip(every, classes, strict=True) if c > 98])


def _folders(root: Path) -> Listed:
    """Every image below the folder of its class, in the order of the names."""
    return [
        (path, directory.name)
        for directory in sorted(p for p in root.iterdir() if p.is_dir())
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(root).parts)  # copies
    ]


def _halves(args: argparse.Namespace, listed: Listed) -> Split:
    """The first half of the classes, by name, to train, the others to test: they share none."""
    names = sorted({name for _, name in listed})
    first = set(names[: len(names) // 2])
    train = [item for item in listed if item[1] in first]
    return _split(args, train, [item for item in listed if item[1] not in first])


def _split(args: argparse.Namespace, train: Listed, test: Listed, gallery: Listed = []) -> Split:  # noqa: B006
    for part, listed in (("train", train), ("test", test)):
        if not listed:
            raise ValueError(f"--dataset {args.dataset} --root {args.root}: no images to {part}")
    missing = [path for path, _ in (*train, *test, *gallery) if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(train) + len(test) + len(gallery)} images of --dataset "
            f"{args.dataset} are missing, such as {missing[0]}"
        )
    searched = _names([*test, *gallery])
    return Split(
        _files(args, train, _names(train)),
        _files(args, test, searched),
        _files(args, gallery, searched) if gallery else None,
    )


def _names(listed: Iterable[tuple[Path, str]]) -> list[str]:
    return sorted({name for _, name in listed})


def _files(args: argparse.Namespace, listed: Listed, names: list[str]) -> Files:
    place = {name: label for label, name in enumerate(names)}
    labels = torch.tensor([place[name] for _, name in listed])
    return Files([path for path, _ in listed], labels, _called(names), args.image_size)
