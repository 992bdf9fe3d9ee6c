"""The grid runner: every cell once, what is finished is kept, the statistics by hand."""

from __future__ import annotations

import csv
import os
import signal

import pytest
import torch
from study import compare, summary
from test_examples import SMALL
from trainer import export, options, report

from s2sd_pml import S2SDLoss

TINY = [*SMALL[:-2], "--workers", "2", "--seeds", "0", "1", "--sizes", "4", "8"]


def rows(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_grid_is_run_once_grows_and_resumes(tmp_path, capsys):
    few = ["--workers", "1", "--sizes", "4", "--methods", "base", "MSD"]
    flags = ["--output", str(tmp_path), *TINY, *few]
    compare.main(flags)
    first = rows(tmp_path)
    assert {(r["method"], r["size"], r["seed"]) for r in first} == {
        (method, "4", seed) for method in ("base", "MSD") for seed in "01"
    }
    for row in first:
        assert 0 < float(row["Recall@1"]) < 1
        assert row["batch_size"] == "32"
        assert {"torch", "s2sd_pml", "training_seconds", "wall_seconds", "lr"} <= set(row)
    assert {p.name for p in tmp_path.glob("*.*")} == {
        "results.csv",
        "recall.png",
        "differences.png",
        "table.md",
    }
    lost = sorted((tmp_path / "cells").glob("*.json"))[3]
    lost.unlink()  # as if killed before it was written
    (lost.with_suffix(".tmp")).write_text("half a row")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*.json")}
    compare.main([*flags, "--method", "soft: --variant msd --temperature 4"])
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())  # none was run again
    grown = rows(tmp_path)
    assert len(grown) == 6
    numbers = ("method", "size", "seed", "Recall@1", "MAP@R")
    again = [[r[k] for k in numbers] for r in grown if r["method"] != "soft"]
    assert again == [[r[k] for k in numbers] for r in first]
    assert {r["temperature"] for r in grown if r["method"] == "soft"} == {"4.0"}
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "| soft |" in table


def test_another_flag_is_another_cell(tmp_path):
    def cells(*flags):
        args = compare_args(["--output", str(tmp_path), *flags])
        return {entry.cell.path for entry in compare.grid(*args)}

    assert cells("--validation").isdisjoint(cells())
    assert cells("--lr", "0.1").isdisjoint(cells())
    assert cells("--seeds", "0") < cells()
    longer = [name for name in compare.METHODS if name.endswith("twice the steps")]
    found = compare.grid(*compare_args(["--methods", *longer, "--epochs", "3"]))
    assert {entry.method for entry in found} == {*longer}
    assert all("--epochs 6" in " ".join(entry.cell.flags) for entry in found)


@pytest.mark.slow
def test_embedders_fitted_anew_share_the_training_of_their_trunk(tmp_path):
    methods = [
        "base",
        "base, refitted embedder",
        "heads, no KL",
        "heads, refitted embedder",
        "MSDF, high-rate, refitted embedder",
    ]
    flags = [
        "--output",
        str(tmp_path),
        *TINY,
        "--sizes",
        "4",
        "--seeds",
        "0",
        "--methods",
        *methods,
    ]
    with pytest.raises(SystemExit, match="'base, refitted embedder' needs --refit STEPS"):
        compare.main(flags)
    with pytest.raises(SystemExit, match="'Matryoshka' has no refitted embedder"):
        compare.main([*flags, "Matryoshka", "--refit", "5"])
    own = "own, refitted embedder: --variant msd --dims 8"
    with pytest.raises(SystemExit, match="'own, refitted embedder' needs --refit STEPS"):
        compare.main([*flags[: -len(methods)], "base", "--method", own])
    compare.main([*flags, "--refit", "5", "--method", own])
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4
    found = {r["method"]: r for r in rows(tmp_path)}
    assert list(found) == [*methods, "own, refitted embedder"]
    assert len({r["MAP@R"] for r in found.values()}) == len(found)
    recipe = S2SDLoss.recipe("high-rate")
    for name in methods[2:]:  # the KL is the recipe's, in force at the end or throughout
        assert float(found[name]["refit_weight"]) == recipe["distill_weight"]
        assert float(found[name]["temperature"]) == recipe["temperature"]
        assert found[name]["exclude_self"] == str(recipe["exclude_self"])
    usual = compare_args([])[0].methods
    assert set(compare.METHODS) - set(usual) == {m for m in compare.METHODS if "refit" in m}


@pytest.mark.parametrize("variant", ["msdf", "msdfa"])
def test_the_recipe_of_the_library_is_in_the_grid(variant):
    flags = compare.METHODS[f"{variant.upper()}, high-rate"].flags.split()
    args = options.parse(options.parser(), flags)
    recipe = S2SDLoss.recipe("high-rate")
    assert tuple(args.dims) == recipe.pop("head_dims")
    assert (recipe.pop("head") is torch.nn.Linear) == args.linear_heads
    assert {name: getattr(args, name) for name in recipe} == recipe
    assert args.variant == variant


@pytest.mark.slow
def test_what_serves_all_sizes_is_trained_once_and_teachers_come_first(tmp_path):
    names = ["base", "base 512 + PCA", "Matryoshka", "two-stage distillation"]
    flags = ["--output", str(tmp_path), *TINY, "--seeds", "0", "--sizes", "8", "16", "128", "256"]
    compare.main([*flags, "--methods", *names])
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4 + 1 + 1 + 4  # PCA's is the teacher
    found = {(r["method"], int(r["size"])): r for r in rows(tmp_path)}
    absent = {("Matryoshka", 8), ("Matryoshka", 256)}  # it has 16, 32, 64 and 128 dimensions
    assert set(found) == {(n, s) for n in names for s in (8, 16, 128, 256)} - absent
    pca = [float(found["base 512 + PCA", size]["Recall@1"]) for size in (8, 128)]
    assert 0 < pca[0] < pca[1] < 1
    student, teacher = (found[name, 8] for name in ("two-stage distillation", "base 512 + PCA"))
    assert float(student["training_seconds"]) > float(teacher["training_seconds"])
    assert "--dims --feature-distill-weight 0" in student["flags"]
    folder = next(p for p in (tmp_path / "cells").iterdir() if (p / "model.pt").exists())
    assert export.load(folder / "model.pt").embedding_size == 512


def test_a_cell_that_was_stopped_goes_on(tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    flags = ["--output", str(tmp_path), *TINY, "--seeds", "0", "--sizes", "4", "--methods", "base"]
    (entry,) = compare.grid(*compare_args(flags))
    with monkeypatch.context() as patch:
        patch.setattr(report, "components", lambda _: os.kill(os.getpid(), signal.SIGINT) or {})
        with pytest.raises(SystemExit):
            compare.run_cell(entry.cell)
    assert not entry.cell.path.exists()
    compare.run_cell(entry.cell)
    (row,) = compare.results([entry])
    assert 0 < row["Recall@1"] < 1


def compare_args(flags):
    return compare.parser().parse_known_args(flags)


def test_paired_differences_by_hand():
    results = [
        {"method": method, "size": 8, "seed": seed, "Recall@1": value / 100}
        for method, found in {"base": [50, 52, 60], "MSD": [51, 55]}.items()
        for seed, value in enumerate(found)
    ]
    assert summary.differences(results, "MSD", 8) == pytest.approx([1, 3])
    assert "| MSD | 53.0 (+2.0 ± 12.7) |" in summary.table(results)
    assert "| base | 54.0 |" in summary.table(results)
    results.append({"method": "base", "size": 16, "seed": 0, "Recall@1": 0.7})
    assert "| MSD | 53.0 (+2.0 ± 12.7) |  |" in summary.table(results)
    alone = summary.table([r for r in results if r["seed"] == results[0]["seed"]])
    assert "±" not in alone
    assert "| MSD | " in alone


def test_a_bad_method_is_named(tmp_path):
    with pytest.raises(SystemExit, match="not of the form"):
        compare.main(["--output", str(tmp_path), "--method", "no colon"])


def test_the_differences_of_one_size_are_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(summary.plt, "close", drawn.append)
    results = [
        {"method": method, "size": 16, "seed": seed, "Recall@1": value / 100}
        for method, found in {"base": [50, 52], "MSD": [51, 55], "DSD": [49, 49]}.items()
        for seed, value in enumerate(found)
    ]
    summary.draw_differences(results, tmp_path / "differences.png")
    (axes,) = drawn[0].axes
    points = dict(
        zip([t.get_text() for t in axes.get_yticklabels()], axes.lines[0].get_xdata(), strict=True)
    )
    assert points == pytest.approx({"MSD": 2, "DSD": -2})
    assert "16 dimensions" in axes.get_xlabel()
