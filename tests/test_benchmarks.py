"""The benchmark scripts run, and what they count is counted right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

from harness import peak_memory  # noqa: E402
from launches import launches  # noqa: E402

FUSED = "" if torch.__version__ < "2.4" else " --fused"  # no fused Adam on the CPU before
SMALL = {
    "loss_step": "--batches 8 --dims 6 7 --features 5 --embedding-size 4 --losses contrastive",
    "distillation": "--batches 8 --teachers 6 7 --embedding-size 4 --chunk-size 3",
    "full_step": "--backbone tiny --batch 8 --size 8 --dims 6 7" + FUSED,
    "launches": "--batch 8 --features 5",
    "scaling": "--batch 8 --teachers 6 7 --ranks 1 2",
}


def test_every_script_is_tried():
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"harness", "plain"}
    assert scripts == set(SMALL)


@pytest.mark.parametrize(
    "name",
    [n if n == "loss_step" else pytest.param(n, marks=pytest.mark.slow) for n in SMALL],
)
def test_scripts_print_and_save_a_table(name, tmp_path):
    saved = tmp_path / "result"
    flags = f"--repeats 2 --threads 1 --save {saved} {SMALL[name]}".split()
    done = subprocess.run(
        [sys.executable, SCRIPTS / f"{name}.py", *flags],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(saved.with_suffix(".json").read_text())
    assert result["command"].startswith(f"python tests/benchmarks/{name}.py --repeats 2")
    assert "--save" not in result["command"]
    assert all(value == value for row in result["rows"] for value in row.values())  # no nan
    table = saved.with_suffix(".md").read_text().splitlines()[2:-2]
    assert "\n".join(table) in done.stdout


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

    # PyTorch 2.1 tells times in whole microseconds, so a part may seem to stand beside its whole
    assert min(launches(work, "cpu") for _ in range(20)) == 3
