"""The example trainer, really run with a small budget; its data and its metrics."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from study import compare
from trainer import evaluate, icons
from trainer import images as image_module
from trainer.by_name import make_loss, make_miner

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# One thread: batches this small gain nothing from two, and two on a busy machine spin.
SMALL = "--epochs 1 --steps-per-epoch 3 --batch-size 32 --dims 24 32 --threads 1".split()
METRICS = ("Recall@1", "Recall@2", "Recall@4", "Recall@8", "MAP@R", "NMI")
FILES = {"metrics.csv", "table.md", "config.json"}
PICTURES = {
    f"{name}.png"
    for name in "recall losses retrieval dimension similarity spectrum projection".split()
}


def run(tmp_path, *flags):
    train.main([*SMALL, "--quiet", "--no-report", "--output", str(tmp_path), *flags])
    return read(tmp_path)


def read(tmp_path):
    with open(tmp_path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def command(*arguments):
    """Run Python in the working folder, which is not the project's; `examples/` is."""
    paths = [str(ROOT / a) if a.startswith("examples/") else a for a in map(str, arguments)]
    return subprocess.run(
        [sys.executable, *paths],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def final(rows, who):
    return {r["metric"]: float(r["value"]) for r in rows if r["run"] == who}


@pytest.mark.slow
def test_the_command_trains_both_prints_the_table_and_writes_everything(tmp_path):
    done = command("examples/train.py", *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == FILES | PICTURES | {"report.html", "events"}
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for words in ("base", "S2SD", "difference", "head 24", "head 32", "MAP@R", "NMI", "training"):
        assert words in done.stdout
    assert "S2SD: epoch 1 of 1, step 3" in done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives_and_speak_once(tmp_path):
    uneven = "--batch-size 33 --per-class 3 --feature-distill-delay 1 --lr 3e-4".split()
    uneven += ["--device", "cpu"]
    flags = [*SMALL, *uneven, "--no-report", "--output"]
    done = command(*TORCHRUN, "examples/train.py", *flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "two").iterdir()} == FILES | {"events"}
    assert done.stdout.count("Recall@1 ") == done.stdout.count("configuration are in") == 1
    for line in ("base: epoch 1 of 1", "S2SD: epoch 1 of 1"):
        assert done.stderr.count(line) == 1
    assert "Warning" not in done.stderr
    one, two = run(tmp_path / "one", *uneven), read(tmp_path / "two")
    assert [(r["run"], r["step"], r["metric"]) for r in one] == [
        (r["run"], r["step"], r["metric"]) for r in two
    ]
    for a, b in zip(one, two, strict=True):
        trained = a["metric"] in ("loss", "base", "aux", "distill", "feature_distill")
        tolerance = {"rel": 2e-3} if trained else {"abs": 0.02}
        assert float(a["value"]) == pytest.approx(float(b["value"]), **tolerance), a


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_is_reported(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        "import train\nfrom trainer import ranks, report\n"
        "def components(loss_func):\n"
        "    if ranks.rank() == 1:\n"
        "        raise RuntimeError('the disk of rank 1 is full')\n"
        "    return {}\n"
        "report.components = components\n"
        "train.main()\n"
    )
    flags = [*SMALL, "--quiet", "--device", "cpu", "--output", tmp_path / "out"]
    done = command(*TORCHRUN, script, *flags)
    assert done.returncode == 1
    assert "RuntimeError: the disk of rank 1 is full" in done.stderr
    assert not (tmp_path / "out" / "metrics.csv").exists()


@pytest.mark.slow
def test_too_small_a_batch_for_the_ranks_is_refused_once(tmp_path):
    flags = ["--batch-size", "1", "--per-class", "1", "--device", "cpu", "--output", tmp_path]
    done = command(*TORCHRUN, "examples/train.py", *flags)
    assert done.returncode == 1
    assert done.stderr.count("--batch-size 1 is too small for 2 ranks") == 1
    assert not list(tmp_path.iterdir())


def test_the_metrics_hold_every_column_of_the_table(tmp_path):
    rows = run(tmp_path)
    for who in ("base", "S2SD", "head 24", "head 32"):
        scores = final(rows, who)
        assert set(METRICS) <= set(scores)
        assert all(0 <= scores[m] <= 1 for m in METRICS)
        assert scores["Recall@1"] <= scores["Recall@2"] <= scores["Recall@8"]
    table = (tmp_path / "table.md").read_text()
    base, s2sd = (final(rows, who)["Recall@1"] * 100 for who in ("base", "S2SD"))
    (row,) = (line for line in table.splitlines() if "Recall@1" in line)
    cells = [float(c) for c in row.split("|")[2:5]]
    assert cells == pytest.approx([base, s2sd, s2sd - base], abs=0.051)


def test_a_seed_fixes_everything(tmp_path):
    def without_seconds(rows):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    first, again = (run(tmp_path / n, "--feature-distill-delay", "1") for n in "ab")
    other = run(tmp_path / "c", "--feature-distill-delay", "1", "--seed", "1")
    assert without_seconds(first) == without_seconds(again)
    assert without_seconds(first) != without_seconds(other)


def test_the_base_run_does_not_depend_on_s2sd(tmp_path):
    both, alone = run(tmp_path / "a"), run(tmp_path / "b", "--baseline-only")
    assert final(both, "base") == final(alone, "base")
    assert {r["run"] for r in alone} == {"base"}


@pytest.mark.parametrize("variant", ["dsd", "msd", "msdfa"])
def test_variants(tmp_path, variant):
    dims = ["--dims", "24"] if variant == "dsd" else []
    rows = run(tmp_path, "--variant", variant, "--feature-distill-delay", "0", *dims)
    assert (final(rows, "S2SD")["feature_distill"] > 0) == (variant == "msdfa")


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "ProxyAnchorLoss", "--miner", "none", "--loss-lr", "0.03"],
        ["--loss", "TripletMarginLoss", "--miner", "TripletMarginMiner"],
        ["--loss", "SubCenterArcFaceLoss", "--loss-args", "sub_centers=2", "--miner", "none"],
        ["--miner-args", "epsilon=0.2", "--temperature", "0.5", "--exclude-self", "--validation"],
    ],
    ids=["proxies", "triplets", "sub_centers", "settings"],
)
def test_losses_and_miners_by_name(tmp_path, flags):
    assert final(run(tmp_path, *flags), "S2SD")["Recall@8"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--baseline-only", "--s2sd-only"], "leave nothing to train"),
        (["--bach-size", "8"], "unknown argument --bach-size: did you mean --batch-size?"),
        (["--loss", "TripletMarginLos"], "did you mean TripletMarginLoss"),
        (["--loss-args", "gamma=3"], "does not take gamma: MultiSimilarityLoss(alpha=2"),
        (["--loss-args", "gamma"], "not of the form name=value"),
        (["--miner", "HardMiner"], "BatchHardMiner"),
        (["--batch-size", "30"], "no multiple of --per-class 4"),
        (["--epochs", "0"], "not a whole number above 0"),
        (["--distill-weight", "-1"], "distill_weight=-1.0"),
        (["--temperature", "0"], "temperature=0.0"),
        (["--dims", "24", "24"], "repeats a dimension"),
        (["--variant", "dsd", "--dims", "24", "32"], "one head"),
        (["--variant", "msd", "--feature-distill-weight", "5"], "msdf and msdfa"),
    ],
)
def test_bad_flags_end_with_one_clear_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        train.main([*SMALL, "--quiet", "--output", str(tmp_path), *flags])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_fits_two_screens_and_holds_the_papers_settings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100
    assert "--dims 512 1024 1536 2048" in text
    assert "--lr RATE                     paper: 1e-5 [0.003]" in text
    assert "--no-report" in text
    assert "--reach" not in text  # of the study
    assert "--reach" in compare.parser().format_help()


def test_without_a_terminal_an_epoch_is_a_line(tmp_path, capsys):
    train.main([*SMALL, "--epochs", "2", "--no-report", "--output", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        f"{run}: epoch {epoch} of 2" for run in ("base", "S2SD") for epoch in (1, 2)
    ]
    assert re.search(r"step 3, loss [\d.]+, Recall@1 0\.\d+, \d+ s$", lines[0])


def test_with_a_terminal_there_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.main([*SMALL, "--baseline-only", "--no-report", "--output", str(tmp_path)])
    assert "3/3" in capsys.readouterr().err


def test_icons_400_is_the_file_that_its_script_builds():
    every = icons.load()
    assert every.images.shape == (3200, 1, 32, 32)
    assert every.labels.bincount().tolist() == [8] * 400
    assert len(set(every.names)) == 400
    script = (ROOT / "examples" / "data" / "build_icons400.py").read_text()
    with np.load(icons.PATH) as data:
        digest = hashlib.sha256(data["images"].tobytes() + data["labels"].tobytes()).hexdigest()
    assert digest in script


def test_icons_400_splits_share_no_class_and_no_drawing():
    every = icons.load()
    seen, unseen = icons.split(every)
    split = image_module.Split(
        *(image_module.InMemory(*part, icons.prepare) for part in (seen, unseen))
    )
    fewer, held_out, *_ = split.held_out(0.2)
    assert [len(s.names) for s in (seen, unseen, fewer, held_out)] == [200, 200, 160, 40]
    assert set(seen.names).isdisjoint(unseen.names)
    assert set(fewer.names) | set(held_out.names) == set(seen.names)
    drawings = {image.numpy().tobytes() for image in every.images}
    assert len(drawings) == 3200


def test_recall_is_a_hit_among_the_nearest_others():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.7, 0.7]])
    labels = torch.tensor([0, 1, 1, 1, 0])
    # nearest: 0 -> 1, 4; 1 -> 0, 4; 2 -> 3; 3 -> 2; 4 -> 1 or 3, then the other, then 0 or 2
    got = evaluate.recall_at_k(embeddings, labels, ks=(1, 2))
    assert got == {"Recall@1": pytest.approx(2 / 5), "Recall@2": pytest.approx(3 / 5)}


def test_recall_at_1_is_pmls_precision_at_1():
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    embeddings, labels = torch.randn(60, 5), torch.arange(60) % 6
    calculator = AccuracyCalculator(
        include=("precision_at_1",), k=1, knn_func=CustomKNN(CosineSimilarity())
    )
    expected = calculator.get_accuracy(embeddings, labels)["precision_at_1"]
    assert evaluate.evaluate(embeddings, labels)["Recall@1"] == pytest.approx(expected)


def test_sizes_are_filled_in_where_the_constructor_demands_them():
    assert make_loss("P2SGradLoss", {}, 7, 5).weight.shape == (5, 7)
    assert make_loss("SubCenterArcFaceLoss", {"sub_centers": 2}, 7, 5).W.shape == (5, 14)
    assert make_loss("MarginLoss", {}, 7, 5).beta.shape == (1,)
    assert make_miner("none", {}) is None
