"""The data sets of the trainer, read from miniature trees in each set's own format, and batches."""

from __future__ import annotations

import csv
import re
import shutil

import numpy as np
import pytest
import torch
import train
from PIL import Image
from test_examples import final, read
from trainer import icons, image_sets, options, ranks
from trainer.images import Batches, Files, crop
from trees import PER_CLASS, TREES, cub200, folder, inshop, table


def flags_of(dataset, root):
    return ["--dataset", dataset, "--root", str(root), "--image-size", "32"]


def load(dataset, root, *flags):
    return image_sets.load(options.parse(options.parser(), [*flags_of(dataset, root), *flags]))


@pytest.fixture(scope="module", params=TREES)
def tree(request, tmp_path_factory):
    dataset, make = TREES[request.param]
    if image_sets.datasets is None and request.param in ("cub200", "cars196", "sop"):
        pytest.skip("PML reads it from version 2.9 on")
    return dataset, make(tmp_path_factory.mktemp("tree"))


def test_each_format_is_read_with_its_class_split(tree):
    split = load(*tree)
    assert len(split.train) == 6 * PER_CLASS
    assert split.train.labels.bincount().tolist() == [PER_CLASS] * 6
    test = [split.test] if split.gallery is None else [split.test, split.gallery]
    labels = torch.cat([part.labels for part in test])
    assert labels.bincount().tolist() == [PER_CLASS] * 6
    assert len(split.train.names) == len(split.test.names) == 6
    first = {"cub200": "Blue Bird 1", "sop": "1 chair", "inshop": "id_00000001"}
    if tree[0] in first:  # names, not numbers alone
        assert split.train.names[0] == first[tree[0]]
    if tree[0] == "cars196":
        assert re.fullmatch("Car.1 Coupe", split.train.names[0])
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
        images = images / 255
        colours = images.mean(dim=(2, 3))
        for label in labels.unique():
            own = colours[labels == label]
            assert (own - own.mean(dim=0)).abs().max() < 0.05  # a class has one colour


def test_each_format_trains(tree, tmp_path):
    flags = "--epochs 2 --steps-per-epoch 3 --batch-size 12 --per-class 2 --dims 24 32 --threads 1"
    pictures = tree[0] == "inshop"  # they take their time
    more = ["--quiet", "--output", str(tmp_path), "--report" if pictures else "--no-report"]
    train.main([*flags_of(*tree), *flags.split(), *more, "--export", str(tmp_path / "model.pt")])
    rows = read(tmp_path)
    assert 0 <= final(rows, "base")["Recall@1"] <= 1
    assert (tmp_path / "report.html").exists() == pictures
    assert (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("batch", [(), ("--batch-size", "30"), ("--batch-size", "3")])
def test_few_classes_at_the_default_batch_size_as_the_message_suggests(tmp_path, capsys, batch):
    small = "--epochs 1 --steps-per-epoch 2 --dims 24 --threads 1 --quiet --no-report".split()
    flags = [
        *flags_of("folder", folder(tmp_path / "tree")),
        *small,
        "--output",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit):
        train.main([*flags, *batch])
    (fix,) = re.findall(r"use (--batch-size \d+ --per-class \d+)$", capsys.readouterr().err, re.M)
    train.main([*flags, *fix.split()])
    assert 0 <= final(read(tmp_path / "o"), "base")["Recall@1"] <= 1


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
    assert data.images([0], None).min() > 252


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


def test_what_is_wrong_with_the_images_is_reported(tmp_path, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit):
            train.main(["--quiet", "--output", str(tmp_path / "out"), *map(str, flags)])
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "--dataset cub200 needs --root" in refused("--dataset", "cub200")
    assert "does not exist" in refused("--dataset", "folder", "--root", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    for dataset, words in {  # of PML's own, where it reads them
        "cub200": "has no CUB_200_2011/images.txt",
        "cars196": "has no names.csv",
        "sop": "datasets.StanfordOnlineProducts(FOLDER, download=True)",
        "inshop": "has no Eval/list_eval_partition.txt",
        "icons400": "is no file that build_icons400.py writes. For your own images name",
        "folder": "no images to train",
    }.items():
        old = image_sets.datasets is None and dataset in ("cub200", "cars196", "sop")
        words = "needs pytorch-metric-learning 2.9 or later" if old else words
        assert words in refused("--dataset", dataset, "--root", empty)
    (tmp_path / "other.npz").write_bytes(b"")
    words = "other.npz is no file that build_icons400.py writes"
    assert words in refused("--root", tmp_path / "other.npz")
    root = folder(tmp_path / "tree")
    too_many = "--batch-size 64 --per-class 2".split()
    words = "--batch-size 64 with --per-class 2 needs 32 classes, and there are 6 to train with"
    assert words in refused("--dataset", "folder", "--root", root, *too_many)
    path = bad_table(tmp_path / "a", ["class 01", "1_1.png", "trian"])
    assert "line 38: split='trian' is none of" in refused("--dataset", "csv", "--root", path)
    path = bad_table(tmp_path / "b", ["class 01", "gone.png", "train"])
    assert "1 of 37 images of --dataset csv are missing" in refused(
        "--dataset", "csv", "--root", path
    )
    (tmp_path / "heads.csv").write_text("image,class\na.png,1\n")
    words = "needs a first line with path,label"
    assert words in refused("--dataset", "csv", "--root", tmp_path / "heads.csv")
    with open(tmp_path / "a" / "images.csv", "a") as file:
        file.write("class 01\n")
    path = tmp_path / "a" / "images.csv"
    path.write_text(path.read_text().replace("trian", "train"), encoding="utf-8-sig")
    assert "line 39: it has not as many cells" in refused("--dataset", "csv", "--root", path)
    (root / "train").mkdir()
    assert "has train alone: name both" in refused("--dataset", "folder", "--root", root)
    shop = inshop(tmp_path / "shop")
    file = shop / "Eval" / "list_eval_partition.txt"
    file.write_text(file.read_text().replace("query", "qurey"))
    assert "part 'qurey', which is none of" in refused("--dataset", "inshop", "--root", shop)


def test_another_file_of_drawings_is_read_by_halves(tmp_path):
    with np.load(icons.PATH) as data:
        few = {name: array[: len(array) * 50 // 400] for name, array in data.items()}
    np.savez(tmp_path / "few.npz", **few)
    args = options.parse(options.parser(), ["--root", str(tmp_path / "few.npz")])
    split = image_sets.load(args)
    assert split.train.names == few["names"][:25].tolist()
    assert split.test.names == few["names"][25:].tolist()
    assert split.test.labels.bincount().tolist() == [8] * 25
    whole = icons.load().classes(25, 50).images
    assert torch.equal(split.test.images(range(200), None), whole)


def read_as(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    data = Files([tmp_path / name], torch.tensor([0]), ["it"], size=8)
    return data.images([0], None)[0].permute(1, 2, 0).numpy()


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    grey = np.full((16, 16), 40_000, np.uint16)
    assert read_as(tmp_path, Image.fromarray(grey)).mean() == pytest.approx(155, abs=1)
    clear = np.zeros((16, 16, 4), np.uint8)  # black, and transparent
    assert read_as(tmp_path, Image.fromarray(clear)).min() == 255
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 250, 10, 10])
    assert read_as(tmp_path, palette)[4, 4].tolist() == [250, 10, 10]
    assert read_as(tmp_path, palette, "clear.gif", transparency=1).min() == 255
    turned = Image.fromarray(
        np.repeat(np.array([[255, 0]], np.uint8), 16, axis=0).repeat(8, axis=1)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes to the top
    shown = read_as(tmp_path, turned.convert("RGB"), "photo.jpg", exif=exif)
    assert shown[0].mean() > 200 > 50 > shown[-1].mean()
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = read_as(tmp_path, cmyk, "print.jpg")[4, 4]
    assert red[0] > 200 > 60 > red[1]
    with pytest.raises(OSError, match="floating-point numbers, whose range is not known"):
        read_as(tmp_path, Image.fromarray(np.ones((16, 16), np.float32)), "float.tiff")


def test_classes_in_both_parts_and_few_images_are_reported_and_accepted(tmp_path):
    for part in ("train", "test"):
        folder(tmp_path / "tree" / part)
    for label in list((tmp_path / "tree" / "test").iterdir())[3:]:
        shutil.rmtree(label)  # fewer images than neighbours that are asked for
    flags = (
        "--batch-size 8 --per-class 2 --epochs 1 --steps-per-epoch 1 --dims 8 --quiet --no-report"
    )
    more = ["--output", str(tmp_path / "out"), *flags.split()]
    train.main([*flags_of("folder", tmp_path / "tree"), *more])
    title = (tmp_path / "out" / "table.md").read_text().splitlines()[0]
    shared = len(list((tmp_path / "tree" / "test").glob("[!.]*")))
    assert f"{shared} test (of which {shared} are training classes too) classes" in title
    assert final(read(tmp_path / "out"), "base")["Recall@8"] <= 1


@pytest.mark.skipif(image_sets.datasets is None, reason="PML reads it from version 2.9 on")
def test_the_root_may_be_the_data_sets_own_folder(tmp_path):
    cub200(tmp_path)
    assert len(load("cub200", tmp_path / "CUB_200_2011").train) == 6 * PER_CLASS
