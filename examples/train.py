"""Train a base loss and S2SD on the same images and compare them on unseen classes.

    python examples/train.py
    python examples/train.py --recipe cub-r50-128-msim --root DIR
    python examples/train.py --dataset folder --root DIR --backbone resnet50 --lr 1e-5
    python examples/train.py --loss ProxyAnchorLoss --miner none --loss-lr 0.03
    torchrun --nproc_per_node=2 examples/train.py
    python examples/train.py --help

Writes config.json, metrics.csv, table.md, pictures, and report.html with all of them, to
``--output``; TensorBoard's events while it trains. Ctrl-C ends it with a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import checkpoint
import events
import export
import image_sets
import images
import optim
import options
import page
import plots
import ranks
import refit
import report
import spaces
import stop
import torch
from baselines import NestedLoss, teacher
from by_name import LossAndMiner, pml_loss
from evaluate import apply, recall_at_k
from images import Batches, Images, Split
from network import Network
from reach import PAPERS, OtherReach
from report import VALIDATION, Run
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from s2sd_pml import ProjectionHead, S2SDLoss
from s2sd_pml.errors import S2SDError

CHECKPOINTS = "checkpoints"


def base_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """That loss as it is. Over several ranks S2SDLoss without S2SD brings the batch together."""
    loss_func, miner = pml_loss(args, num_classes)
    if args.nested:
        return NestedLoss(loss_func, miner, args.embedding_size, args.nested), None
    if ranks.world() == 1:
        return loss_func, miner
    whole = S2SDLoss(
        loss_func, miner, head_dims=(), feature_distill_weight=0, gather_distributed=True
    )
    return whole, None


def s2sd_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """The same loss and miner inside S2SDLoss, which mines for itself."""
    features: dict[str, Any] = {"embedder": model.embedder}
    if args.variant == "msdfa":  # max pooling needs the feature map
        features = {"trunk": model.trunk, "feature_dim": model.embedder.in_features}
    if args.teacher:  # the features are its embeddings
        features = {"feature_dim": export.load(args.teacher).embedding_size}
    kind: type[S2SDLoss] = S2SDLoss
    if args.reach != PAPERS:
        kind, features["reach"] = OtherReach, args.reach
    loss_func = kind(  # the variant without its checks: controls have weights of 0, or no heads
        *pml_loss(args, num_classes),
        **features,
        pooling="avg+max" if args.variant == "msdfa" else "avg",
        head_dims=() if args.teacher else args.dims,
        head=nn.Linear if args.linear_heads else ProjectionHead,
        distill_weight=ramp(args, args.distill_weight),
        temperature=args.temperature,
        feature_distill_weight=ramp(args, args.feature_distill_weight),
        feature_distill_delay=args.feature_distill_delay * args.accumulate,  # it counts forwards
        exclude_self=args.exclude_self,
        gather_distributed=ranks.world() > 1,
    )
    return loss_func, None


def ramp(args: argparse.Namespace, full: float) -> float | Callable[[int], float]:
    """A weight under ``--ramp``: 0, then rising, then full."""
    if not args.ramp or not full:  # 0 switches a term off, a function of steps does not
        return full
    first, last = (step * args.accumulate for step in args.ramp)  # it counts forwards
    return lambda step: full * min(1.0, max(0.0, (step - first) / (last - first)))


def make_network(args: argparse.Namespace, split: Split) -> Network:
    """The network for these images."""
    channels = split.train[[0], None][0].shape[1]
    network = Network(
        args.embedding_size,
        args.backbone,
        channels=channels,
        image_size=args.image_size,
        pretrained=args.pretrained,
        weights=args.weights,
        freeze_bn=args.freeze_bn,
    )
    return network if args.channels_last else network.to(memory_format=torch.contiguous_format)


def make_batches(args: argparse.Namespace, train: Images) -> Batches:
    """The training batches."""
    per_epoch = args.steps_per_epoch * args.accumulate
    return Batches(train.labels, args.batch_size, args.per_class, per_epoch, args.seed)


class Trainer:
    """One run, from its start or from the states of a checkpoint.

    Seeds are set first: both runs have the same start, batches and augmentation.
    """

    def __init__(
        self,
        name: str,
        losses: Callable[..., LossAndMiner],
        args: argparse.Namespace,
        split: Split,
        held_out: Images | None,
        settings: dict[str, Any],
        states: dict[str, Any] | None,
    ) -> None:
        checkpoint.seed(args.seed)
        self.args, self.split, self.held_out, self.settings = args, split, held_out, settings
        model = ranks.synchronised(make_network(args, split).to(args.device))
        average = optim.Average(args, model)  # a copy, before the loss puts hooks on the model
        loss_func, self.miner = losses(args, model, len(split.train.names))
        loss_func.to(args.device)
        optimizer = optim.make_optimizer(args, model, loss_func)
        self.total = args.epochs * args.steps_per_epoch
        self.teacher = None
        if args.teacher and isinstance(loss_func, S2SDLoss):
            self.teacher = teacher(args.teacher, args.device)
        self.schedule = optim.make_schedule(args, optimizer, self.total)
        self.stepper = optim.Stepper(args, optimizer, model)
        self.average, self.loss_func = average, loss_func
        self.run = Run(name, average.model, loss_func, trained=model)
        own = {"trained": model} if args.ema else {}  # the heads stand on its features
        self.best = optim.Best(model=average.model, loss_func=loss_func, **own)
        self.parts = {
            "run": self.run,
            "model": model,
            "loss_func": loss_func,
            "optimizer": optimizer,
            "schedule": self.schedule,
            "stepper": self.stepper,
            "average": average,
            "best": self.best,
            "random": checkpoint.RandomStates(),
        }
        for part, state in (states or {}).items():
            self.parts[part].load_state_dict(state)
        ranks.agree(self.run.step, args.device)
        if args.compile:  # after the copy for --ema, which is only tested
            model.trunk.forward = torch.compile(model.trunk.forward)
        self.embed, self.objective = ranks.parallel(model), ranks.parallel(loss_func)

    def train(self, asked: stop.Request) -> Run:
        """All steps that are left, then the scores."""
        try:
            return self._train(asked)
        finally:
            del self.embed, self.objective

    def _train(self, asked: stop.Request) -> Run:
        args, run = self.args, self.run
        main_rank = ranks.rank() == 0
        log = events.Events(args, run.name, run.step, len(run.history)) if main_rank else None
        batches = make_batches(args, self.split.train)
        loader = iter(
            DataLoader(
                self.split.train,
                batch_size=None,
                sampler=batches.between(run.step * args.accumulate, self.total * args.accumulate),
                num_workers=args.workers,
                pin_memory=torch.device(args.device).type == "cuda",
                generator=torch.Generator(),  # the global one is left alone
                worker_init_fn=stop.ignore,
            )
        )
        silent = args.quiet or not main_rank
        with tqdm(total=self.total, initial=run.step, desc=f"{run.name:4}", disable=silent) as bar:
            while run.step < self.total:
                start = time.perf_counter()
                found = [self.batch(*next(loader)) for _ in range(args.accumulate)]
                self.stepper.step()
                self.schedule.step()
                self.average.update()
                run.step += 1
                run.recorded.append(report.mean(found))
                run.seconds += time.perf_counter() - start
                bar.set_postfix({k: f"{v:.3g}" for k, v in run.recorded[-1].items()}, refresh=False)
                bar.update()
                if run.step % args.steps_per_epoch == 0:
                    run.end_epoch()
                    if main_rank:
                        self.look()
                        log.write(run.history)
                ended = ranks.on_any(asked.made, args.device)
                every = args.checkpoint_every
                due = every and (run.step % every == 0 or run.step == self.total)
                if main_rank and (due or ended):
                    self.save()
                if ended:
                    raise stop.Stopped
        if main_rank:
            self.best.restore()
            cuts = args.cut if run.name == "base" else ()
            if args.refit:
                self.refit()
            run.score(self.split, args.workers, cuts, nmi=args.nmi)
            log.write(run.rows())
            log.close()
            if asked.made:
                self.save()
                raise stop.Stopped
        return run

    def batch(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Forward and backward; the loss and its terms."""
        pixels, labels = pixels.to(self.args.device), labels.to(self.args.device)
        if self.args.channels_last:
            pixels = pixels.to(memory_format=torch.channels_last)
        with self.stepper.autocast():
            embeddings = self.embed(pixels)
        s2sd = isinstance(self.loss_func, S2SDLoss)  # which knows what to do under autocast
        with self.stepper.autocast(enabled=s2sd):
            embeddings = embeddings if s2sd else embeddings.float()
            pairs = self.miner(embeddings, labels) if self.miner else None
            loss = self.objective(embeddings, labels, pairs, **self.taught(pixels))
        self.stepper.backward(loss / self.args.accumulate)
        return {"loss": loss.item(), **report.components(self.loss_func)}

    def taught(self, pixels: torch.Tensor) -> dict[str, Any]:
        """What a teacher from outside makes of these images."""
        return {"features": self.teacher(pixels)} if self.teacher else {}

    def look(self) -> None:
        """After an epoch: how well the model does on held-out or on unseen classes."""
        run, last = self.run, self.run.step == self.total
        looked, gallery = self.held_out or self.split.test, None
        if self.held_out is None and last:
            return  # the scores hold it
        embeddings = apply(run.model, looked, self.args.workers)
        if self.held_out is None and self.split.gallery is not None:
            searched = apply(run.model, self.split.gallery, self.args.workers)
            gallery = searched, self.split.gallery.labels
        recall = recall_at_k(embeddings, looked.labels, ks=(1,), gallery=gallery)["Recall@1"]
        run.record({VALIDATION if self.held_out else "Recall@1": recall})
        if self.held_out:
            self.best.update(recall, run.epoch)
            run.chosen = self.best.epoch

    def refit(self) -> None:
        """Another embedder for the trained trunk: by the base loss, and the KL to the heads."""
        args, run, images, start = self.args, self.run, self.split.train, time.perf_counter()
        frozen = refit.freeze(run.project(images, args.workers), images.labels)
        γ = 0.0 if frozen.teacher is None else args.refit_weight
        size, steps = args.embedding_size, args.refit
        run.refitted = refit.fit(args, frozen, size, steps=steps, distill_weight=γ)
        run.refit_seconds = time.perf_counter() - start

    def save(self) -> None:
        """Write a checkpoint."""
        folder = self.args.output / CHECKPOINTS
        checkpoint.save(folder, self.run.name, self.run.step, self.settings, self.parts)


def prepare(args: argparse.Namespace) -> tuple[Split, Images | None]:
    """The images, and the held-out ones of --choose-epoch."""
    split, held_out = image_sets.load(args), None
    if args.choose_epoch:
        inner = split.held_out(args.validation_share)
        split, held_out = split._replace(train=inner.train), inner.test
    if args.steps_per_epoch is None:
        args.steps_per_epoch = max(1, len(split.train) // (args.batch_size * args.accumulate))
    return split, held_out


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
        if ranks.world() > 1 and (args.nested or args.teacher or args.reach != PAPERS):
            raise ValueError("--nested, --teacher and --reach are for one process")
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
        again = ", its embedder fitted anew," if args.refit else ","
        print(f"The {runs[-1].name} model{again} loaded back and compared, is in {args.export}")


if __name__ == "__main__":
    main()
