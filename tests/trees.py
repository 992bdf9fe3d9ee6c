"""Miniature data sets, each in its own format on disk: a class is a colour, with some noise."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

PER_CLASS = 3


def draw(path: Path, label: int, number: int) -> None:
    """An image that shows its class; every fourth is in grey, as in real data sets."""
    random = np.random.RandomState(1000 * label + number)
    colour = np.random.RandomState(label).randint(30, 225, 3)
    height, width = random.randint(24, 60, 2)
    pixels = np.clip(colour + random.randint(-20, 20, (height, width, 3)), 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.convert("L") if number == 3 else image).save(path)


def numbered(train: int, classes: int = 6) -> list[int]:
    """Some classes of the training part, which are 1 to ``train``, and as many of the others."""
    return [*range(1, classes + 1), *range(train + 1, train + classes + 1)]


def cub200(root: Path) -> Path:
    lines = [
        (label, f"{label:03d}.Blue_Bird_{label}/Bird_{number:04d}.jpg", number)
        for label in numbered(100)
        for number in range(PER_CLASS)
    ]
    folder = root / "CUB_200_2011"
    for label, name, number in lines:
        draw(folder / "images" / name, label, number)
    for file, column in (("images.txt", 1), ("image_class_labels.txt", 0)):
        text = "".join(f"{i} {line[column]}\n" for i, line in enumerate(lines, start=1))
        (folder / file).write_text(text)
    return root


def cars196(root: Path) -> Path:
    """As PML downloads it."""
    names = [f"Car/{number} Coupe" for number in range(1, 197)]
    root.mkdir(exist_ok=True)
    (root / "names.csv").write_text("\n".join(names) + "\n")
    for part, numbers in (("train", (0, 1)), ("test", (2,))):  # each has images of all classes
        rows = []
        for label in numbered(98):
            folder = root / "car_data" / "car_data" / part / names[label - 1].replace("/", "-")
            for number in numbers:
                draw(folder / f"{label:03d}{number}.jpg", label, number)
                rows.append([f"{label:03d}{number}.jpg", 1, 1, 20, 20, label])
        with open(root / f"anno_{part}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    return root


def cars196_as_published(root: Path) -> Path:
    """cars_annos.mat and car_ims."""
    rows = []
    for label in numbered(98):
        for number in range(PER_CLASS):
            name = f"car_ims/{len(rows) + 1:06d}.jpg"
            draw(root / name, label, number)
            rows.append((name, 1, 1, 20, 20, label, number % 2))
    fields = "relative_im_path bbox_x1 bbox_y1 bbox_x2 bbox_y2 class test".split()
    notes = np.array(rows, dtype=[(name, object) for name in fields])
    names = np.array([f"Car {number} Coupe" for number in range(1, 197)], dtype=object)
    savemat(root / "cars_annos.mat", {"annotations": notes[None], "class_names": names})
    return root


def sop(root: Path) -> Path:
    folder = root / "Stanford_Online_Products"
    image = 0
    for part, labels in (("train", numbered(11318)[:6]), ("test", numbered(11318)[6:])):
        lines = ["image_id class_id super_class_id path"]
        for label in labels:
            for number in range(PER_CLASS):
                image += 1
                path = f"chair_final/{label}_{number}.JPG"
                draw(folder / path, label, number)
                lines.append(f"{image} {label} 3 {path}")
        (folder / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def inshop(root: Path) -> Path:
    rows = []
    for label in range(1, 13):
        for number in range(PER_CLASS):
            path = f"img/WOMEN/Dresses/id_{label:08d}/{number:02d}_1_front.jpg"
            draw(root / "Img" / path, label, number)
            part = "train" if label <= 6 else ("query" if number == 0 else "gallery")
            rows.append(f"{path}   id_{label:08d}   {part}")
    (root / "Eval").mkdir()
    text = "\n".join([str(len(rows)), "image_name item_id evaluation_status", *rows])
    (root / "Eval" / "list_eval_partition.txt").write_text(text + "\n")
    return root


def folder(root: Path) -> Path:
    for label in range(12):
        for number in range(PER_CLASS):
            draw(root / f"größe {label:02d} ($a_1$" / f"{number}.png", label, number)
    first = next(root.iterdir())
    (first / "notes.txt").write_text("no image")
    draw(first / ".copies" / "0.png", 0, 0)  # what programs leave
    draw(root / ".ipynb_checkpoints" / "0.png", 0, 0)
    return root


def folder_split(root: Path) -> Path:
    for label in range(12):
        for number in range(PER_CLASS):
            part = "train" if label < 6 else "test"
            draw(root / part / f"class {label:02d}" / f"{number}.png", label, number)
    return root


def table(root: Path, split: bool = True) -> Path:
    path = root / "images.csv"
    root.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "path", "split"][: 3 if split else 2])
        for label in range(12):
            for number in range(PER_CLASS):
                draw(root / f"{label}_{number}.png", label, number)
                row = [f"class {label:02d}", f"{label}_{number}.png"]
                writer.writerow([*row, "train" if label < 6 else "query"] if split else row)
    return path


TREES = {
    "cub200": ("cub200", cub200),
    "cars196": ("cars196", cars196),
    "cars196, as published": ("cars196", cars196_as_published),
    "sop": ("sop", sop),
    "inshop": ("inshop", inshop),
    "folder": ("folder", folder),
    "folder, split": ("folder", folder_split),
    "csv": ("csv", lambda root: table(root, split=False)),
    "csv, split": ("csv", table),
}
