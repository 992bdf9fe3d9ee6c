"""The short examples: each loop really trains, alone and on two processes."""

from __future__ import annotations

import re

import pytest
from test_examples import ENVIRONMENT, ROOT, TORCHRUN, command

EXAMPLES = ROOT / "examples"
ACCELERATE = "-m accelerate.commands.launch --cpu --num_processes 2".split()
RUNS = {
    "plain": ["examples/plain_loop.py"],
    "pml_trainer": ["examples/pml_trainer.py", "--output", "{tmp}"],
    "lightning": ["examples/lightning_module.py"],
    "accelerate": ["examples/accelerate_loop.py"],
    "accelerate_2": [*ACCELERATE, "examples/accelerate_loop.py"],
    "torchrun_2": [*TORCHRUN, "examples/torchrun_loop.py"],
}
UNTRAINED = 15.0  # per cent of Recall@1, of a network with these 16 dimensions


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("name", RUNS)
def test_an_integration_trains_and_says_what_it_reached(name, tmp_path):
    done = command(*(str(a).format(tmp=tmp_path) for a in RUNS[name]), "--epochs", "3")
    assert done.returncode == 0, done.stderr
    (reached,) = re.findall(r"Recall@1 on unseen classes: (.*)%$", done.stdout, re.MULTILINE)
    assert float(reached) > 1.4 * UNTRAINED
    assert "OptimizerWarning" not in done.stderr


def test_the_index_is_searched_at_each_size(tmp_path):
    done = command("examples/faiss_search.py", "--epochs", "1", "--copies", "1", "--sizes", 8, 24)
    assert done.returncode == 0, done.stderr
    rows = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in done.stdout.splitlines()]
    (_, small, _, _), (_, large, _, _) = (row for row in rows if len(row) == 4)
    assert 3 < small < large


def test_an_exported_model_is_searched(tmp_path):
    flags = "--epochs 1 --steps-per-epoch 2 --batch-size 16 --dims 24 --threads 1 --quiet".split()
    path = tmp_path / "model.pt"
    done = command("examples/train.py", *flags, "--output", tmp_path, "--export", path)
    assert done.returncode == 0, done.stderr
    done = command("examples/faiss_search.py", "--copies", "1", "--models", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| 16 \| [\d.]+ \| [\d.]+ \| 0 \|$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_loop.py")), ids=lambda p: p.stem)
def test_what_is_added_to_a_loop_is_marked_and_short(path):
    added = [line for line in path.read_text(encoding="utf-8").splitlines() if "# S2SD" in line]
    assert 5 <= len(added) <= 8
    assert any("import S2SDLoss" in line for line in added)
    assert any("add_to" in line for line in added)
