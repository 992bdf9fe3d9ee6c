"""The data sets of the trainer, read from miniature trees in each set's own format, and batches."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from test_examples import final, read
from trees import PER_CLASS, TREES, cub200, folder, table

import image_sets  # isort: skip
import options  # isort: skip
import ranks  # isort: skip
import train  # isort: skip
from images import Batches, Files, crop  # isort: skip


def flags_of(dataset, root):
    return ["--dataset", dataset, "--root", str(root), "--image-size", "32"]


def load(dataset, root, *flags):
    return image_sets.load(options.parse(options.parser(), [*flags_of(dataset, root), *flags]))


@pytest.fixture(scope="module", params=TREES)
def tree(request, tmp_path_factory):
    dataset, make = TREES[request.param]
    return dataset, make(tmp_path_factory.mktemp("tree"))


def test_each_format_is_read_with_its_class_split(tree):
    split = load(*tree)
    assert len(split.train) == 6 * PER_CLASS
    assert split.train.labels.bincount().tolist() == [PER_CLASS] * 6
    test = [split.test] if split.gallery is None else [split.test, split.gallery]
    labels = torch.cat([part.labels for part in test])
    assert labels.bincount().tolist() == [PER_CLASS] * 6
    assert len(split.train.names) == len(split.test.names) == 6
    paths = [set(part.paths) for part in (split.train, *test)]
    assert len(set.union(*paths)) == 12 * PER_CLASS  # no image is in two parts
    if tree[0] == "inshop":
        assert len(split.test) == 6  # a query a class, the others in the gallery
        assert split.gallery.names == split.test.names


def test_labels_and_images_belong_together(tree):
    split = load(*tree)
    for part in (split.train, split.test):
        images, labels = part[list(range(len(part))), None]
        assert images.shape == (len(part), 3, 32, 32)
        colours = images.mean(dim=(2, 3))
        for label in labels.unique():
            own = colours[labels == label]
            assert (own - own.mean(dim=0)).abs().max() < 0.05  # a class has one colour


def test_each_format_trains(tree, tmp_path):
    flags = "--epochs 2 --steps-per-epoch 3 --batch-size 12 --per-class 2 --dims 24 32 --threads 1"
    pictures = tree[0] in ("inshop", "folder")  # they take their time
    more = ["--quiet", "--output", str(tmp_path), "--report" if pictures else "--no-report"]
    train.main([*flags_of(*tree), *flags.split(), *more, "--export", str(tmp_path / "model.pt")])
    rows = read(tmp_path)
    assert 0 <= final(rows, "base")["Recall@1"] <= 1
    assert (tmp_path / "report.html").exists() == pictures
    assert (tmp_path / "model.pt").exists()


def test_the_held_out_classes_are_training_classes(tree):
    whole, split = load(*tree), load(*tree, "--validation", "--validation-share", "0.5")
    assert len(split.train.names) == len(split.test.names) == 3
    assert [*split.train.names, *split.test.names] == whole.train.names
    assert split.gallery is None


def test_any_worker_rank_and_start_gives_the_same_batches(tmp_path, monkeypatch):
    split = load("folder", folder(tmp_path))

    def batches(start, stop, workers=0):
        keys = Batches(split.train.labels, 6, 2, steps=3, seed=5).between(start, stop)
        torch.manual_seed(start + workers)  # what else draws does not matter
        np.random.seed(start)
        loader = torch.utils.data.DataLoader(
            split.train, batch_size=None, sampler=keys, num_workers=workers
        )
        return list(loader)

    whole = batches(0, 7)
    for other, first in ((batches(0, 7, workers=2), 0), (batches(4, 7), 4)):
        for (x, y), (x2, y2) in zip(whole[first:], other, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
            assert y.unique(return_counts=True)[1].tolist() == [2, 2, 2]
    assert not torch.equal(whole[0][0], whole[3][0])  # epochs differ
    parts = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "own", lambda x, rank=rank: x.tensor_split(2)[rank])
        parts.append(batches(0, 7))
    for (x, y), a, b in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([a[0], b[0]]))
        assert torch.equal(y, torch.cat([a[1], b[1]]))


def test_the_crop_of_a_test_image_is_its_middle(tmp_path):
    pixels = np.zeros((320, 640, 3), np.uint8)
    pixels[14:306, 174:466] = 255  # 7/8 of the shorter side, in the middle, and a pixel to scale
    Image.fromarray(pixels).save(tmp_path / "middle.png")
    data = Files([tmp_path / "middle.png"], torch.tensor([0]), ["white"], size=56)
    assert data.images([0], None).min() > 0.99


def test_random_crops_stay_inside_and_cover_the_published_range():
    random = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = crop(random, 200, 150)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 150
        shares.append((right - left) * (bottom - top) / (200 * 150))
        ratios.append((right - left) / (bottom - top))
    assert 0.08 <= min(shares) < 0.1
    assert max(shares) > 0.9
    assert 0.749 <= min(ratios) < 0.77
    assert 1.3 < max(ratios) <= 1.334
    assert crop(random, 1000, 10) == (0, 0, 1000, 10)  # nothing fits: the whole image


def bad_table(tmp_path, row):
    path = table(tmp_path)
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow(row)
    return path


def test_what_is_wrong_with_the_images_is_told(tmp_path, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit):
            train.main(["--quiet", "--output", str(tmp_path / "out"), *map(str, flags)])
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "--dataset cub200 needs --root" in refused("--dataset", "cub200")
    assert "does not exist" in refused("--dataset", "folder", "--root", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    for dataset, words in {
        "cub200": "has no CUB_200_2011/images.txt",
        "cars196": "has no names.csv",
        "sop": "datasets.StanfordOnlineProducts(FOLDER, download=True)",
        "inshop": "has no Eval/list_eval_partition.txt",
        "folder": "no images to train",
    }.items():
        assert words in refused("--dataset", dataset, "--root", empty)
    root = folder(tmp_path / "tree")
    too_many = "--batch-size 64 --per-class 2".split()
    words = "--batch-size 64 with --per-class 2 needs 32 classes, and there are 6 to train with"
    assert words in refused("--dataset", "folder", "--root", root, *too_many)
    small = ["--batch-size", "8", "--per-class", "2"]
    path = bad_table(tmp_path / "a", ["class 01", "1_1.png", "trian"])
    assert "line 38: split='trian' is none of" in refused("--dataset", "csv", "--root", path)
    path = bad_table(tmp_path / "b", ["class 01", "gone.png", "train"])
    assert "1 of 37 images of --dataset csv are missing" in refused(
        "--dataset", "csv", "--root", path
    )
    (tmp_path / "heads.csv").write_text("image,class\na.png,1\n")
    words = "needs a first line with path,label"
    assert words in refused("--dataset", "csv", "--root", tmp_path / "heads.csv")
    (root / "class 01" / "0.png").write_bytes(b"no image at all")
    with pytest.raises(OSError, match=r"class 01/0\.png cannot be read as an image"):
        load("folder", root).train.images([3], None)
    assert "cannot be read" not in refused(
        "--dataset", "folder", "--root", root, *small, "--dims", 0
    )


def test_the_root_may_be_the_data_sets_own_folder(tmp_path):
    cub200(tmp_path)
    assert len(load("cub200", tmp_path / "CUB_200_2011").train) == 6 * PER_CLASS
