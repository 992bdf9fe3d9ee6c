"""What the command ``python examples/train.py`` does, from its flags to its report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from s2sd_pml.errors import S2SDError

from . import (
    baselines,
    checkpoint,
    events,
    export,
    images,
    optim,
    options,
    page,
    plots,
    ranks,
    report,
    spaces,
    stop,
    tables,
)
from .by_name import LossAndMiner
from .images import Images, Split
from .objectives import base_loss, s2sd_loss
from .reach import PAPERS
from .report import Run
from .training import CHECKPOINTS, Trainer, make_batches, make_network, prepare

Makers = dict[str, Callable[..., LossAndMiner]]
States = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train both runs for every seed, evaluate, write and print."""
    parser = options.parser()
    args = options.parse(parser, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    makers = makers_of(args)
    try:  # build everything once: what is wrong with the flags shows before any training
        split, held_out = check(args, makers)
        if args.dry_run:
            images.check(*(part for part in split[:3] if part is not None))
            print(json.dumps(vars(args), indent=2, default=str), report.counts(split), sep="\n\n")
            return
        seeds = [own_args(args, seed) for seed in args.seeds]
        states = [states_of(own, makers, split, len(seeds) > 1) for own in seeds]
        if len(seeds) > 1 and report.other_run(args):
            raise ValueError(OTHER_RUN.format(args.output))
        if args.export and args.export.is_dir():
            raise ValueError(f"--export {args.export} is a folder: name a file")
        for own in seeds:
            own.output.mkdir(parents=True, exist_ok=True)
    except (S2SDError, ValueError, OSError) as error:
        parser.error(str(error))

    device = ranks.start(args.device)
    with stop.Request() as asked, shared(args, seeds, states) as todo:
        for own, found in todo:
            own.device = device
            if ranks.rank() == 0:
                report.write_config(own)
                if len(seeds) > 1 and not args.quiet:
                    print(f"seed {own.seed}", file=sys.stderr)
            runs = train(own, makers, split, held_out, found, asked)
            if own is seeds[-1]:
                ranks.stop()
            if ranks.rank() == 0:
                finish(args, own, runs, split)
        if states[-1] is None:
            ranks.stop()
    if ranks.rank() == 0:
        summarise(args, [tables.read(own.output / "metrics.csv") for own in seeds], split)


@contextlib.contextmanager
def shared(
    args: argparse.Namespace, seeds: list[argparse.Namespace], states: list[States | None]
) -> Iterator[Iterator[tuple[argparse.Namespace, States]]]:
    """The seeds that are not finished, one after the other.

    On a CPU other processes take some of them, one a core, with a thread each. With --threads all
    are trained here.
    """
    todo = deque((own, f) for own, f in zip(seeds, states, strict=True) if f is not None)
    here = _until_empty(todo)
    processes = min(len(todo), os.cpu_count() or 1) - 1
    if processes < 1 or args.device != "cpu" or args.threads or ranks.world() > 1:
        yield here
        return
    torch.set_num_threads(1)
    first, trained = todo.popleft(), []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:

        def take(_: object = None) -> None:
            with contextlib.suppress(IndexError, RuntimeError):  # no more, or the end
                trained.append(pool.submit(train_alone, args, todo.popleft()[0]))
                trained[-1].add_done_callback(take)

        try:
            for _ in range(processes):
                take()
            yield itertools.chain([first], here)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for future in trained:
        future.result()


def _until_empty(todo: deque[Any]) -> Iterator[Any]:
    with contextlib.suppress(IndexError):  # another thread takes from it too
        while True:
            yield todo.popleft()


def train_alone(args: argparse.Namespace, own: argparse.Namespace) -> None:
    """What such a process does with a seed; after Ctrl-C, nothing."""
    if ENDED:
        sys.exit(STOPPED)
    torch.set_num_threads(1)
    makers = makers_of(args)
    split, held_out = prepare(own)
    found = states_of(own, makers, split, several=True)
    assert found is not None
    report.write_config(own)
    with stop.Request() as asked:
        quiet = argparse.Namespace(**{**vars(own), "quiet": True})
        finish(args, own, train(quiet, makers, split, held_out, found, asked), split)


def makers_of(args: argparse.Namespace) -> Makers:
    """The runs of a seed."""
    makers: Makers = {"base": base_loss, "S2SD": s2sd_loss}
    if args.baseline_only or args.s2sd_only:
        del makers["S2SD" if args.baseline_only else "base"]
    return makers


ENDED: list[str] = []  # why this process trains no more
STOPPED = 130  # the exit status after Ctrl-C
OTHER_RUN = "{} holds the results of a run with other settings: use another --output, or delete it"


def check(args: argparse.Namespace, makers: Makers) -> tuple[Split, Images | None]:
    """Build everything once, and refuse what cannot be trained."""
    if ranks.world() > 1 and (args.teacher or args.reach != PAPERS):
        raise ValueError("--teacher and --reach are for one process")
    ranks.check(args.device, args.batch_size, args.backbone == "cnn" or args.freeze_bn)
    split, held_out = prepare(args)
    network = make_network(args, split)
    for make in makers.values():
        make(args, network, len(split.train.names))
    if args.teacher:
        baselines.teacher(args.teacher, args.device)
    optim.Stepper(args, torch.optim.Adam(network.parameters()), network)
    make_batches(args, split.train)
    events.check(args)
    few = int((split.train.labels.bincount() < args.per_class).sum())
    if few and ranks.rank() == 0:
        print(
            f"{few} training classes have fewer than --per-class {args.per_class} images: some "
            "are drawn more than once",
            file=sys.stderr,
        )
    return split, held_out


def own_args(args: argparse.Namespace, seed: int) -> argparse.Namespace:
    """The flags of one seed; of several, each has a folder of its own in --output."""
    own = {"seed": seed, "seeds": [seed]}
    if len(args.seeds) > 1:
        own["output"] = args.output / f"seed-{seed}"
    return argparse.Namespace(**{**vars(args), **own})


def states_of(
    args: argparse.Namespace, makers: Makers, split: Split, several: bool
) -> States | None:
    """Where the runs of a seed start; None if they are finished, as one of several can be."""
    folder = args.output / CHECKPOINTS
    if report.other_run(args):
        raise ValueError(OTHER_RUN.format(args.output))
    if not args.resume:
        if checkpoint.files(folder):
            raise ValueError(f"{folder} holds checkpoints: add --resume, or use another --output")
        return dict.fromkeys(makers)
    if several and report.finished(args):
        return None
    settings = report.settings(args, split)
    states = {name: checkpoint.newest(folder, name, settings) for name in makers}
    if not any(states.values()) and not args.quiet and ranks.rank() == 0:
        print(f"{folder} holds no checkpoints: starting anew", file=sys.stderr)
    return states


def train(
    args: argparse.Namespace,
    makers: Makers,
    split: Split,
    held_out: Images | None,
    states: States,
    asked: stop.Request,
) -> list[Run]:
    """The runs of one seed. Ctrl-C ends the program with a checkpoint."""
    settings = report.settings(args, split)
    trainers: list[Trainer] = []
    try:
        for name, make in makers.items():
            trainers.append(Trainer(name, make, args, split, held_out, settings, states[name]))
            trainers[-1].train(asked)
    except stop.Stopped:
        ended(trainers, "Stopped")
        ranks.stop()
        sys.exit(STOPPED)
    except OSError as error:  # an image, a full disk
        if ranks.world() > 1 or not trainers:
            raise
        trainers[-1].save()
        ended(trainers, f"{error}\nPut a whole file of that name in its place. Ended")
        sys.exit(1)
    return [trainer.run for trainer in trainers]


def ended(trainers: list[Trainer], how: str) -> None:
    """Keep what was done, and say how to go on."""
    ENDED.append(how)
    if ranks.rank() == 0:
        for finished in trainers[:-1]:
            finished.save()
        run = trainers[-1].run
        print(
            f"\n{how} after step {run.step} of {run.name}. The same command with --resume goes on.",
            file=sys.stderr,
        )


def finish(
    args: argparse.Namespace, own: argparse.Namespace, runs: list[Run], split: Split
) -> None:
    """Write the results of a seed; of the first one, export the model and draw its spaces."""
    if own.seed == args.seed:
        if args.export:
            if args.refit:
                runs[-1].model.embedder = runs[-1].refitted
            some, _ = split.test[list(range(min(len(split.test), 64))), None]
            export.write(runs[-1].model, args.export, some.to(own.device))
        if args.report:
            plots.retrieval(runs, split, args.output / "retrieval.png", seed=args.seed)
            spaces.draw(runs, split, args.output, args.seed, args.workers)
    report.write(own, runs, split)  # last: with it, the seed is finished
    if not own.checkpoint_every:  # what Ctrl-C left has served
        shutil.rmtree(own.output / CHECKPOINTS, ignore_errors=True)


def summarise(args: argparse.Namespace, seeds: list[tables.Rows], split: Split) -> None:
    """Write and print what came out, over all seeds."""
    if len(seeds) > 1:
        report.write_seeds(args, seeds, split)
    if args.report:
        plots.recall(seeds, args.output / "recall.png")
        plots.losses(seeds, args.output / "losses.png")
        page.write(args.output)
    print(report.title(args, split), tables.table(seeds), sep="\n\n")
    print(f"\nMetrics and configuration are in {args.output}", end="")
    print(", with pictures in report.html" if args.report else "")
    if args.export:
        which = " with the refitted embedder" if args.refit else ""
        name = "base" if args.baseline_only else "S2SD"
        print(f"The {name} model{which}, loaded back and compared, is in {args.export}")
