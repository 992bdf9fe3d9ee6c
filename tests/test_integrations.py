"""The short examples: each loop really trains, alone and on two processes."""

from __future__ import annotations

import os
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient
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
BY_DEFAULT = ("plain",)  # the others are slow
UNTRAINED = 15.0  # % of Recall@1, of a network with these 16 dimensions


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    "name",
    [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in RUNS],
)
def test_an_integration_trains_and_says_what_it_reached(name, tmp_path):
    done = command(*(str(a).format(tmp=tmp_path) for a in RUNS[name]), "--epochs", "3")
    assert done.returncode == 0, done.stderr
    (reached,) = re.findall(r"Recall@1 on unseen classes: (.*)%$", done.stdout, re.MULTILINE)
    assert float(reached) > 1.4 * UNTRAINED
    assert "OptimizerWarning" not in done.stderr


@pytest.mark.slow
def test_the_index_is_searched_at_each_size(tmp_path):
    done = command("examples/faiss_search.py", "--epochs", "1", "--copies", "1", "--sizes", 8, 24)
    assert done.returncode == 0, done.stderr
    rows = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in done.stdout.splitlines()]
    (_, small, _, _), (_, large, _, _) = (row for row in rows if len(row) == 4)
    assert 3 < small < large


@pytest.mark.slow
def test_an_exported_model_is_searched(tmp_path):
    flags = "--epochs 1 --steps-per-epoch 2 --batch-size 16 --dims 24 --threads 1 --quiet".split()
    path = tmp_path / "model.pt"
    done = command("examples/train.py", *flags, "--output", tmp_path, "--export", path)
    assert done.returncode == 0, done.stderr
    done = command("examples/faiss_search.py", "--copies", "1", "--models", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| 16 \| [\d.]+ \| [\d.]+ \| 0 \|$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.__version__ < "2.4", reason="transformers needs torch 2.4")
@pytest.mark.slow
def test_a_text_encoder_learns():
    flags = ["--steps", "20", "--test-classes", "60"]
    done = command("examples/sentence_embeddings.py", *flags)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"Recall@1 .*: (.*)%$", done.stdout, re.MULTILINE))
    assert before + 2 < after  # 23.0 and 29.9 where this was written


@pytest.mark.parametrize("flags", [(), ("--variant", "msdfa")])
def test_a_timm_backbone_trains(flags):
    pytest.importorskip("timm", reason="timm needs a torchvision that fits torch")
    small = "--backbone mobilenetv3_small_050 --not-pretrained --steps 2 --lr 1e-3".split()
    done = command("examples/timm_backbone.py", *small, *flags)
    assert done.returncode == 0, done.stderr
    assert "Recall@1 on unseen classes" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_loop.py")), ids=lambda p: p.stem)
def test_what_is_added_to_a_loop_is_marked_and_short(path):
    added = [line for line in path.read_text(encoding="utf-8").splitlines() if "# S2SD" in line]
    assert 5 <= len(added) <= 8
    assert any("import S2SDLoss" in line for line in added)
    assert any("add_to" in line for line in added)


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(EXAMPLES)]))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    for cell in notebook.cells:
        cell.source = cell.source.replace("EPOCHS = 10", "EPOCHS = 1")
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"^S2SD, 16 dimensions +[\d.]+%$", printed, re.MULTILINE)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
