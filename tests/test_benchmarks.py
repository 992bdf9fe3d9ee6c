"""The benchmark scripts run, what they count is counted right, and the docs show their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "benchmarks"
sys.path[:0] = [str(SCRIPTS), str(ROOT / "docs")]

import draw_performance  # noqa: E402
from harness import peak_memory  # noqa: E402
from launches import launches, reads  # noqa: E402

FUSED = "" if torch.__version__ < "2.4" else " --fused"  # no fused Adam on the CPU before
SMALL = {
    "loss_step": "--repeats 2 --batches 8 --dims 6 7 --features 5 --embedding-size 4 "
    "--losses Contrastive",
    "distillation": "--repeats 2 --batches 8 --teachers 6 7 --embedding-size 4 --chunk-size 3",
    "full_step": "--repeats 2 --backbone cnn --batch 8 --sizes 16 --dims 6 7" + FUSED,
    "launches": "--batch 8 --features 5 --dims 6 7 --losses Circle --prefixes 2 3",
}


def test_every_script_is_tried():
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"harness", "plain"}
    assert scripts == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_scripts_print_and_save_a_table(name, tmp_path):
    if name == "launches" and torch.__version__ < "2.4":
        pytest.skip("its dispatch modes know no ``byte ^ 1``")
    saved = tmp_path / "result.json"
    flags = f"--threads 1 {SMALL[name]}".split()
    done = subprocess.run(
        [sys.executable, SCRIPTS / f"{name}.py", *flags, "--save", saved],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(saved.read_text())
    assert result["command"] == " ".join([f"python tests/benchmarks/{name}.py", *flags])
    assert all(value == value for row in result["rows"] for value in row.values())  # no nan
    assert f"| {' | '.join(result['rows'][0])} |" in done.stdout


def test_the_page_shows_the_saved_results():
    page = draw_performance.PAGE.read_text(encoding="utf-8")
    assert draw_performance.rewritten(page) == page, "run python docs/draw_performance.py"


def test_the_figure_is_drawn(tmp_path):
    draw_performance.draw(tmp_path / "performance.png")
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    def work():
        first = torch.empty(250_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(125_000)
        del second, third

    assert peak_memory(work) == pytest.approx(4 * 750_000, rel=0.01)


def test_launches_are_operations_that_do_work():
    x = torch.randn(4, 4)

    def work():
        (x.T @ x[:, 1:].relu()).add(x[:, 1:])

    # PyTorch 2.1 rounds times to whole microseconds, so a part may seem to be outside of its whole
    assert min(launches(work, "cpu") for _ in range(20)) == 3


def test_reads_are_operations_whose_result_python_has_to_know():
    x = torch.randn(4, 4, requires_grad=True)
    mask = torch.eye(4).bool()

    def silent():
        x.detach()[torch.tensor([0, 1])].masked_fill(mask[:2], 0.0).sum()
        x.detach().clone()[mask] = 0.0

    def waits():
        x[mask].sum().backward()  # by the size of what is taken, then of what is given back
        x.sum().item()

    assert reads(silent, "cpu") == 0
    assert reads(waits, "cpu") == 3
