"""The bound on what copying gives: every embedder of a frozen trunk has its row."""

from __future__ import annotations

import csv

import pytest
from study import ceiling
from test_examples import SMALL
from trees import inshop


def test_it_writes_a_row_for_every_embedder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceiling, "STEPS", 3)
    sizes = ["--sizes", "4", "8", "--seeds", "0", "1"]
    ceiling.main([*SMALL, *sizes, "--embedding-size", "8", "--output", str(tmp_path)])
    with open(tmp_path / "ceiling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [*ceiling.KINDS, "heads"]
    jointly = [r for r in rows if r["method"] == ceiling.JOINTLY]
    assert [r["method"] for r in rows if r not in jointly] == kinds * 4
    assert [(r["size"], r["seed"]) for r in jointly] == [("8", "0"), ("8", "1")]
    assert {(r["size"], r["seed"]) for r in rows} == {(d, s) for d in "48" for s in "01"}
    assert {r["dims"] for r in rows} == {"[24, 32]"}  # the configuration is next to the numbers
    teachers = {(r["seed"], r["Recall@1"]) for r in rows if r["method"] == "heads"}
    assert len(teachers) == 2  # one a seed, whatever the size
    assert (tmp_path / "ceiling.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "ceiling.png").read_bytes().startswith(b"\x89PNG")


def test_the_trunk_of_the_base_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(ceiling, "STEPS", 3)
    flags = ["--sizes", "4", "8", "--seeds", "0", "--baseline-only", "--embedding-size", "8"]
    ceiling.main([*SMALL, *flags, "--output", str(tmp_path)])
    with open(tmp_path / "ceiling.csv", newline="") as file:
        found = [(r["method"], r["size"]) for r in csv.DictReader(file)]
    assert found == [("base", "4"), ("base", "8"), (ceiling.JOINTLY, "8")]


def test_what_it_cannot_measure_is_refused(tmp_path, capsys):
    (tmp_path / "model.pt").touch()
    with pytest.raises(SystemExit):
        ceiling.main([*SMALL, "--teacher", str(tmp_path / "model.pt")])
    assert "--teacher brings no heads to copy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ceiling.main([*SMALL, "--reach", "embedder"])
    assert "--reach embedder: the trunk is frozen here" in capsys.readouterr().err
    flags = "--dataset inshop --image-size 16 --batch-size 4 --per-class 2 --steps-per-epoch 1"
    with pytest.raises(SystemExit):
        ceiling.main([*flags.split(), "--root", str(inshop(tmp_path))])
    assert "inshop has a gallery" in capsys.readouterr().err
