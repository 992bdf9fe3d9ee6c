"""Several seeds in one command: their table, intervals, curves, and what is not trained again."""

from __future__ import annotations

import csv
import json
import math
import os
import signal

import pytest
import train
from test_examples import PICTURES, SMALL
from trainer import report, tables

pytestmark = pytest.mark.slow


def run(folder, *flags):
    train.main([*SMALL, "--quiet", "--output", str(folder), *flags])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(folder, "--seeds", "3", "5", "--epochs", "2")
    return folder


def recalls(path):
    found = tables.scores(tables.read(path))
    return {who: 100 * found[who]["Recall@1"] for who in ("base", "S2SD", "head 24", "head 32")}


def cells(folder):
    lines = (folder / "table.md").read_text().splitlines()
    head, row = (next(x for x in lines if x.startswith(f"| {n}")) for n in ("  ", "Recall@1"))
    strip = lambda line: [cell.strip() for cell in line.split("|")[2:-1]]  # noqa: E731
    return dict(zip(strip(head), strip(row), strict=True))


def test_the_table_has_means_and_the_paired_difference_with_its_interval(two):
    first, second = (recalls(two / f"seed-{seed}" / "metrics.csv") for seed in (3, 5))
    found = cells(two)
    for who in first:
        assert float(found[who]) == pytest.approx((first[who] + second[who]) / 2, abs=0.051)
    shift, half = found["difference"].split(" ± ")
    a, b = (of["S2SD"] - of["base"] for of in (first, second))
    assert float(shift) == pytest.approx(float(found["S2SD"]) - float(found["base"]), abs=1e-9)
    assert float(half) == pytest.approx(12.7062 * abs(a - b) / 2, abs=0.051)  # t(0.975, 1)


def test_every_seed_is_the_run_of_that_seed_alone(two, tmp_path):
    run(tmp_path, "--seed", "5", "--epochs", "2", "--no-report")
    assert recalls(tmp_path / "metrics.csv") == recalls(two / "seed-5" / "metrics.csv")
    assert "seed" in json.loads((tmp_path / "config.json").read_text())


def test_the_report_says_what_the_interval_is(two):
    text = (two / "report.html").read_text(encoding="utf-8")
    assert "Means of 2 seeds" in text
    assert "does not cover the choice of classes" in text
    assert {path.name for path in two.glob("*.png")} == PICTURES
    with open(two / "metrics.csv", newline="") as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"3", "5"}
    assert json.loads((two / "config.json").read_text())["seeds"] == [3, 5]


def test_finished_seeds_are_not_trained_again_and_more_can_follow(tmp_path, monkeypatch, capsys):
    flags = ["--seeds", "0", "1", "--baseline-only", "--no-report"]
    original, calls = report.components, []

    def interrupted(loss_func):
        calls.append(loss_func)
        if len(calls) == 5:  # step 2 of seed 1
            os.kill(os.getpid(), signal.SIGINT)
        return original(loss_func)

    monkeypatch.setattr(report, "components", interrupted)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *flags)
    assert caught.value.code == 130
    done = (tmp_path / "seed-0" / "metrics.csv").stat().st_mtime_ns
    run(tmp_path, *flags, "--resume")
    assert len(calls) == 6  # the last step of seed 1
    flags[1:3] = ["0", "1", "2"]
    run(tmp_path, *flags, "--resume")
    assert len(calls) == 9
    assert (tmp_path / "seed-0" / "metrics.csv").stat().st_mtime_ns == done
    assert "mean of 3 seeds (0, 1, 2)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path, *flags, "--resume", "--lr", "1")
    assert "results of a run with other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--seeds", "1", "1")
    assert "--seeds 1 1 repeats a seed" in capsys.readouterr().err


def test_the_interval_by_hand():
    mean, half = tables.interval([1.0, 2.0, 3.0, 6.0])
    # t(0.975, 3) = 3.18245; the deviation is sqrt(14 / 3), over sqrt(4)
    assert (mean, half) == pytest.approx((3.0, 3.18245 * math.sqrt(14 / 3) / 2), abs=1e-4)
    assert math.isnan(tables.interval([1.0])[1])


def test_the_best_epoch_is_that_of_the_curve():
    rows = [("S2SD", epoch, 1, "Recall@1", v, 0.0) for epoch, v in enumerate((0.2, 0.5, 0.4), 1)]
    assert tables.best_epoch(rows, "S2SD") == 2
    chosen = [*rows, ("S2SD", 1, 1, tables.VALIDATION, 0.9, 0.0)]
    assert tables.best_epoch(chosen, "S2SD") == 1
    assert tables.best_epoch(rows, "head 24") == 0


def test_the_difference_is_that_of_the_cells():
    rows = [(who, 1, 1, m, v, 1.0) for who, v in (("base", 0.5624), ("S2SD", 0.5706))
            for m in ("Recall@1", "MAP@R")]  # fmt: skip
    line = tables.table([rows]).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["56.2", "57.1", "+0.9"]
