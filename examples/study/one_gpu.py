"""The grid of compare.py on one GPU: the same cells, batches, losses and results, much sooner.

    python examples/study/one_gpu.py examples/study/cub.plan --root DIR

- The images of all steps are cropped beforehand, by all CPU cores, as train.py does it.
- A training step, from pixels to the optimizer, is one CUDA graph.
- ``--lanes`` cells with the same batches take every step in turn, on streams of their own, in each
  of ``--processes`` processes.

Losses that read from the device (most miners) are trained without a graph. Precision is that of
``--amp``; results differ from those of a CPU by rounding.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn

from s2sd_pml import S2SDLoss, stacking

sys.path.insert(0, str(Path(__file__).parents[1]))  # of trainer and study

from trainer import options, report, stop, training
from trainer.images import Split
from trainer.main import finish, makers_of

from study import compare
from study.compare import BASE, Cell
from study.crops import Crops, crops_name, data_flags, in_memory, labels_of, load, make_crops

WARM = 11  # eager steps before a capture: as PyTorch asks for, and until the guard is content


def parsed(cell: Cell) -> Any:
    """The flags of a cell, in full."""
    args = options.parse(options.parser(), [*cell.flags, "--no-report", "--quiet"])
    if args.steps_per_epoch is None:
        args.steps_per_epoch = max(1, len(load(data_flags(args)).train) // args.batch_size)
    return args


class Stacked(nn.Module):
    """A base loss and its miner as S2SDLoss computes them: PML's values, nothing read back."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor, _: object = None) -> Tensor:
        return stacking.stacked_losses([self.loss], [self.miner], [embeddings], labels)[0]


class Lane:
    """A cell in training: its steps as CUDA graphs on a stream of its own."""

    def __init__(self, cell: Cell, args: Any, split: Split, store: Tensor, labels: Tensor) -> None:
        self.cell, self.args, self.split = cell, args, split
        ((name, make),) = makers_of(args).items()
        self.trainer = training.Trainer(name, make, args, split, None, {}, None)
        self.store, self.labels = store, labels
        self.now = torch.zeros(1, dtype=torch.long, device=args.device)
        self.recorded: Tensor | None = None
        self.names: list[str] = []
        self.on_gpu = torch.device(args.device).type == "cuda"
        self.graph: Any = None
        if self.on_gpu:
            self.stream = torch.cuda.Stream()
            for group in self.trainer.parts["optimizer"].param_groups:
                group["capturable"] = True
                if args.schedule != "constant":
                    group["lr"] = torch.tensor(group["lr"], device=args.device)
        delay = getattr(self.trainer.loss_func, "feature_distill_delay", 0)
        self.captured_at = {WARM, max(delay, WARM)}  # feature distillation is another graph
        base = getattr(self.trainer.loss_func, "loss", self.trainer.loss_func)
        self.captures = self.on_gpu and type(base) is MultiSimilarityLoss and not args.ramp
        if self.captures and base is self.trainer.loss_func:
            self.trainer.objective = Stacked(base, self.trainer.miner)
            self.trainer.miner = None

    def step(self) -> None:
        """One training step, with nothing read from the device."""
        t = self.trainer
        pixels = self.store.index_select(0, self.now)[0]
        labels = self.labels.index_select(0, self.now)[0]
        loss = t.forward(pixels, labels)
        t.stepper.backward(loss)
        t.stepper.step()
        terms = t.loss_func.components if getattr(t.loss_func, "head_dims", ()) else {}
        values = {"loss": loss.detach()} | {n: terms[n] for n in report.COMPONENTS if n in terms}
        if self.recorded is None:
            self.names = list(values)
            self.recorded = torch.zeros(len(self.store), len(values), device=pixels.device)
        row = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        self.recorded.index_copy_(0, self.now, row[None])
        self.now += 1

    def advance(self, step: int) -> None:
        """Take a step, or let the GPU take it."""
        t = self.trainer
        if not self.on_gpu:
            self.step()
            t.schedule.step()
        else:
            with torch.cuda.stream(self.stream):
                if self.captures and step in self.captured_at:
                    self.capture(step)
                if self.graph is None:
                    self.step()
                else:
                    self.graph.replay()
                t.schedule.step()
        t.run.step += 1

    def capture(self, step: int) -> None:
        """The step as a graph."""
        loss_func = self.trainer.loss_func
        torch.cuda.synchronize()
        if isinstance(loss_func, S2SDLoss):
            loss_func.step = step
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()

    def finish(self, seconds: float) -> None:
        """Scores and results, as a cell of compare.py has them."""
        t, args = self.trainer, self.args
        run, self.graph = t.run, None
        run.seconds = seconds
        values = self.recorded[: run.step].cpu()
        run.step = 0
        for epoch in values.split(args.steps_per_epoch):
            run.step += len(epoch)
            run.recorded = [dict(zip(self.names, map(float, row), strict=True)) for row in epoch]
            run.end_epoch()
        if args.refit:
            t.refit()
        cuts = args.cut if run.name == BASE else ()
        run.score(self.split, 0, cuts, args.matryoshka_dims, args.nmi)
        args.output.mkdir(parents=True, exist_ok=True)
        finish(args, args, [run], self.split)
        compare.keep(self.cell, seconds)


class Group(NamedTuple):
    """Cells that see the same batches for the same number of steps."""

    cells: list[Cell]
    crops: Crops
    steps: int


def groups(cells: Sequence[Cell], lanes: int, folder: Path) -> list[Group]:
    """In the order of the cells; the crops of a name are as many as its longest run needs."""
    every = [(cell, parsed(cell)) for cell in cells]
    longest: dict[str, int] = {}
    for _, args in every:
        steps, name = args.epochs * args.steps_per_epoch, crops_name(args)
        longest[name] = max(longest.get(name, 0), steps)
    found: list[Group] = []
    for cell, args in every:
        name, steps = crops_name(args), args.epochs * args.steps_per_epoch
        crops = Crops(args, longest[name], folder / f"{abs(hash(name)):x}.npy")
        for group in found:
            same = (group.crops.path, group.steps) == (crops.path, steps)
            if (
                same
                and len(group.cells) < lanes
                and bool(group.cells[0].teacher) == bool(cell.teacher)
            ):
                group.cells.append(cell)
                break
        else:
            found.append(Group([cell], crops, steps))
    return found


def train_groups(queue: Any, deadline: float, device: str, number: int) -> None:
    """What a process does: group after group, while there is time."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    held: dict[Path, tuple[Tensor, Tensor]] = {}
    tests: dict[tuple[str, ...], Split] = {}
    while True:
        group: Group | None = queue.get()
        if group is None or time.time() > deadline:
            return
        try:
            train_group(group, held, tests, device, number, deadline)
        except Exception:  # the other cells go on
            traceback.print_exc()
        gc.collect()  # graphs hold their memory
        if device == "cuda":
            torch.cuda.empty_cache()


def train_group(
    group: Group, held: Any, tests: Any, device: str, number: int, deadline: float
) -> None:
    """Train the cells of a group side by side, and write their results."""
    flags = data_flags(group.crops.args)
    if flags not in tests:
        tests[flags] = in_memory(load(flags), device)
    started = time.time()
    while not group.crops.ready or not all(
        c.teacher is None or c.teacher.exists() for c in group.cells
    ):
        if time.time() > deadline:
            return
        time.sleep(0.2)
    waited = time.time() - started
    key = group.crops.path, group.steps
    if key not in held:
        held.clear()
        memory = torch.from_numpy(np.load(group.crops.path, mmap_mode="r")[: group.steps])
        held[key] = memory.to(device), labels_of(group.crops)[: group.steps].to(device)
    store, labels = held[key]
    lanes = []
    for cell in group.cells:
        args = options.parse(options.parser(), [*cell.flags, *cell.output, "--device", device])
        args.steps_per_epoch = group.crops.args.steps_per_epoch
        lanes.append(Lane(cell, args, tests[flags], store, labels))
    on_gpu = lanes[0].on_gpu
    start, first = time.time(), min(10, group.steps // 2)  # step that is timed, once all is built
    for step in range(group.steps):
        if step == first:
            if on_gpu:
                torch.cuda.synchronize()
            built = time.time()
        for one in lanes:
            one.advance(step)
    if on_gpu:
        torch.cuda.synchronize()
    end = time.time()
    for one in lanes:
        one.finish((end - start) / len(lanes))
    each = 1e3 * (end - built) / (group.steps - first) / len(lanes)
    print(
        f"[{number}] {len(lanes)} cells x {group.steps}: waited {waited:.0f} s, built "
        f"{start - started - waited:.0f} s, trained {end - start:.1f} s ({each:.2f} ms a step), "
        f"scored {time.time() - end:.1f} s",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, write and print."""
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("plan", type=Path, help="a command line of compare.py on each line, the first ones first")
    add("--processes", type=int, default=4)
    add("--lanes", type=int, default=3, help="cells at a time in each of them")
    add("--croppers", type=int, default=os.cpu_count() or 1)
    add("--minutes", type=float, default=60.0, help="start no cell after that")
    add("--device", default="cuda")
    add("--memory", default="/dev/shm", help="where the cropped images lie meanwhile")
    add("--root", default="", help="takes the place of DIR in the plan")
    add("--output", type=Path, default=Path("runs"), help="in which the --output of each line lies")
    args = parser.parse_args(argv)
    grids = []
    for line in args.plan.read_text().splitlines():
        words = shlex.split(line.replace("DIR", args.root), comments=True)
        if words:
            own, rest = compare.parser().parse_known_args(words)
            own.output = args.output / own.output
            grids.append((own.output, compare.grid(own, rest)))
    cells = {entry.cell.path: entry.cell for _, entries in grids for entry in entries}
    run(list(cells.values()), args, started)
    for output, entries in grids:
        print(output)
        compare.write(output, entries)


def end_when_asked() -> None:
    """Ctrl-C and SIGTERM end the grid once, and it deletes its images."""
    grid = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() != grid:  # a cropper
            os._exit(128 + number)
        for each in stop.SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in stop.SIGNALS:
        signal.signal(each, end)


def run(cells: Sequence[Cell], args: argparse.Namespace, started: float) -> None:
    """Train the cells that have no results yet."""
    missing = [cell for cell in cells if not cell.path.exists()]
    with tempfile.TemporaryDirectory(dir=args.memory) as folder:
        train_all(missing, args, started, Path(folder))
    done = sum(cell.path.exists() for cell in cells)
    print(f"{time.time() - started:.0f} s: {done} of {len(cells)} cells", flush=True)


def train_all(
    missing: Sequence[Cell], args: argparse.Namespace, started: float, folder: Path
) -> None:
    """Crop in this process's croppers, train in the others; the images lie in ``folder``."""
    spawn = multiprocessing.get_context("spawn")
    todo = groups(missing, args.lanes, folder)
    queue, deadline = spawn.Queue(), started + 60 * args.minutes
    for group in [*todo, *[None] * args.processes]:
        queue.put(group)
    arguments = [(queue, deadline, args.device, k) for k in range(args.processes)]
    workers = [spawn.Process(target=train_groups, args=a, daemon=True) for a in arguments]
    for worker in workers:
        worker.start()
    with multiprocessing.get_context("fork").Pool(args.croppers) as pool:
        for crops in {group.crops.path: group.crops for group in todo}.values():
            for part in make_crops(crops, pool):
                part.get()
            crops.path.with_suffix(".ready").touch()
            print(f"{time.time() - started:.0f} s: cropped {crops.steps} steps", flush=True)
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    end_when_asked()
    main()
