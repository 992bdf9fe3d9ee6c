"""Compare pieces of work in one process, in turn: a shared machine slows all of them alike."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_metric_learning
import torch
from torch import Tensor

import s2sd_pml

Work = Callable[[], object]


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every script has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--save", type=Path, metavar="FILE", help="write the rows as JSON, too")
    return made


def start(args: argparse.Namespace) -> None:
    """Set threads and seed, and say what this runs on."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("; ".join(f"{key} {value}" for key, value in machine(args).items()))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    on = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu
    return {
        "device": f"{on}, {args.threads} threads",
        "torch": torch.__version__,
        "pytorch-metric-learning": pytorch_metric_learning.__version__,
        "s2sd-pml": s2sd_pml.__version__,
        "python": platform.python_version(),
    }


def in_turn(pieces: dict[str, Work], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every piece, ``repeats`` times, one after the other in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for round_ in range(repeats + 1):
        for name, work in pieces.items():
            synchronise(device)
            begin = time.perf_counter()
            work()
            synchronise(device)
            if round_ > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Median and quartiles, over the rounds, of one piece's time by another's in that round."""
    each = sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"ratio": middle, "low": low, "high": high}


def milliseconds(seconds: list[float]) -> float:
    """The median, in ms."""
    return 1e3 * statistics.median(seconds)


def captured(work: Work) -> Work:
    """The replay of a CUDA graph of this work, on the same tensors."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def peak_memory(work: Work, device: str = "cpu") -> int:
    """Bytes by which the memory of tensors rises at most while the work is done.

    The allocators report every tensor, so nothing is sampled and nothing of other programs counts.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def backward(value: Tensor, *leaves: Tensor) -> None:
    """The gradients, as of a first step."""
    for leaf in leaves:
        leaf.grad = None
    value.backward()


def finish(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table; save them as JSON if asked."""
    print(f"\n{table(rows)}")
    if args.save:
        flags = [flag for flag in sys.argv[1:] if flag not in ("--save", str(args.save))]
        command = shlex.join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *flags])
        args.save.parent.mkdir(parents=True, exist_ok=True)
        saved = {"command": command, "machine": machine(args), "rows": rows}
        args.save.write_text(json.dumps(saved, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    cells = [[cell(row[name]) for name in names] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Three significant digits for what was measured."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
