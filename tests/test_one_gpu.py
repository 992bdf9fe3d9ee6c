"""The grid on one GPU has the cells, batches and results of compare.py."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study import compare, one_gpu

METHODS = ("base", "MSDF", "MSDFA, high-rate", "two-stage distillation", "Matryoshka")
FLAGS = "--sizes 16 --seeds 1 --epochs 2 --steps-per-epoch 3 --feature-distill-delay 4 --no-nmi"
TIMES = ("training_seconds", "wall_seconds", "threads")


def results(folder):
    with open(folder / "results.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    return {name: {k: v for k, v in row.items() if k not in TIMES} for name, row in rows.items()}


@pytest.mark.slow
def test_its_results_are_those_of_compare(tmp_path):
    """Without a GPU, where steps are taken one by one."""
    methods = " ".join(f'"{name}"' for name in METHODS)
    plan = tmp_path / "plan"
    plan.write_text(f"# a comment\n--output grid {FLAGS} --methods {methods}\n")
    here = ["--device", "cpu", "--memory", str(tmp_path), "--output", str(tmp_path)]
    one_gpu.main([str(plan), *here, "--processes", "1", "--lanes", "2", "--croppers", "1"])
    flags = [*FLAGS.split(), "--workers", "1"]
    compare.main([*flags, "--output", str(tmp_path / "own"), "--methods", *METHODS])
    grid, own = (results(tmp_path / folder) for folder in ("grid", "own"))
    for name in METHODS:
        assert grid[name] == own[name]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "sight"), [(signal.SIGTERM, "npy"), (signal.SIGINT, "ready")])
def test_nothing_is_left_in_memory_when_it_is_ended(tmp_path, number, sight):
    """While images are cropped, and while they are trained on."""
    plan, memory = tmp_path / "plan", tmp_path / "memory"
    plan.write_text("--output grid --sizes 16 --seeds 0 --no-nmi --methods base")
    memory.mkdir()
    flags = [plan, "--device", "cpu", "--processes", "1", "--memory", memory, "--output", tmp_path]
    command = [sys.executable, one_gpu.__file__, *map(str, flags)]
    process = subprocess.Popen(command, cwd=Path(one_gpu.__file__).parents[2])
    try:
        while not any(memory.glob(f"*/*.{sight}")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    assert not any(memory.iterdir())
