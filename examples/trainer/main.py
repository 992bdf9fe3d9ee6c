"""What the command ``python examples/train.py`` does, from its flags to its report."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

import torch

from s2sd_pml.errors import S2SDError

from . import (
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
)
from .images import Split
from .objectives import base_loss, s2sd_loss
from .reach import PAPERS
from .report import Run
from .training import CHECKPOINTS, Trainer, make_batches, make_network, prepare


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train both runs, evaluate, write and print."""
    parser = options.parser()
    args = options.parse(parser, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    makers = {"base": base_loss, "S2SD": s2sd_loss}
    if args.baseline_only or args.s2sd_only:
        del makers["S2SD" if args.baseline_only else "base"]
    folder = args.output / CHECKPOINTS
    try:  # build everything once: what is wrong with the flags shows before any training
        if ranks.world() > 1 and (args.teacher or args.reach != PAPERS):
            raise ValueError("--teacher and --reach are for one process")
        ranks.check(args.device, args.batch_size, args.backbone == "cnn" or args.freeze_bn)
        split, held_out = prepare(args)
        network = make_network(args, split)
        for make in makers.values():
            make(args, network, len(split.train.names))
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
        if args.dry_run:
            images.check(*(part for part in split[:3] if part is not None))
            print(json.dumps(vars(args), indent=2, default=str), report.counts(split), sep="\n\n")
            return
        if report.other_run(args):
            raise ValueError(
                f"{args.output} holds the results of a run with other settings: use another "
                "--output, or delete it"
            )
        settings = report.settings(args, split)
        states = dict.fromkeys(makers)
        if args.resume:
            states = {name: checkpoint.newest(folder, name, settings) for name in makers}
            if not any(states.values()) and not args.quiet and ranks.rank() == 0:
                print(f"{folder} holds no checkpoints: starting anew", file=sys.stderr)
        elif checkpoint.files(folder):
            raise ValueError(f"{folder} holds checkpoints: add --resume, or use another --output")
        if args.export and args.export.is_dir():
            raise ValueError(f"--export {args.export} is a folder: name a file")
        args.output.mkdir(parents=True, exist_ok=True)
    except (S2SDError, ValueError, OSError) as error:
        parser.error(str(error))

    args.device = ranks.start(args.device)
    if ranks.rank() == 0:
        report.write_config(args)
    trainers: list[Trainer] = []
    with stop.Request() as asked:
        try:
            for name, make in makers.items():
                trainers.append(Trainer(name, make, args, split, held_out, settings, states[name]))
                trainers[-1].train(asked)
        except stop.Stopped:
            ended(trainers, "Stopped")
            ranks.stop()
            sys.exit(130)
        except OSError as error:  # an image, a full disk
            if ranks.world() > 1 or not trainers:
                raise
            trainers[-1].save()
            ended(trainers, f"{error}\nPut a whole file of that name in its place. Ended")
            sys.exit(1)
    ranks.stop()
    if ranks.rank() == 0:
        finish(args, [trainer.run for trainer in trainers], split)


def ended(trainers: list[Trainer], how: str) -> None:
    """Keep what was done, and tell how to go on."""
    if ranks.rank() == 0:
        for finished in trainers[:-1]:
            finished.save()
        run = trainers[-1].run
        print(
            f"\n{how} after step {run.step} of {run.name}. The same command with --resume goes on.",
            file=sys.stderr,
        )


def finish(args: argparse.Namespace, runs: list[Run], split: Split) -> None:
    """Write and print what came out."""
    report.write(args, runs, split)
    if not args.checkpoint_every:  # what Ctrl-C left has served
        shutil.rmtree(args.output / CHECKPOINTS, ignore_errors=True)
    if args.export:
        if args.refit:
            runs[-1].model.embedder = runs[-1].refitted
        some, _ = split.test[list(range(min(len(split.test), 64))), None]
        export.write(runs[-1].model, args.export, some.to(args.device))
    if args.report:
        plots.recall(runs, args.output / "recall.png")
        plots.retrieval(runs, split, args.output / "retrieval.png", seed=args.seed)
        spaces.draw(runs, split, args.output, args.seed, args.workers)
        page.write(args.output)
    print(report.title(args, split), report.table(runs), sep="\n\n")
    print(f"\nMetrics and configuration are in {args.output}", end="")
    print(", with pictures in report.html" if args.report else "")
    if args.export:
        which = " with the refitted embedder" if args.refit else ""
        print(f"The {runs[-1].name} model{which}, loaded back and compared, is in {args.export}")
