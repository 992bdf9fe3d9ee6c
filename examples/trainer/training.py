"""A run of the trainer, from its start or from a checkpoint, and what it is made of."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from s2sd_pml import S2SDLoss

from . import checkpoint, events, image_sets, optim, ranks, refit, report, stop
from .baselines import teacher
from .by_name import LossAndMiner
from .evaluate import apply, recall_at_k
from .images import Batches, Images, Split
from .network import Network
from .report import Run
from .tables import VALIDATION

CHECKPOINTS = "checkpoints"


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
        if args.teacher and name != "base":
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
        speaks = main_rank and not args.quiet
        bars = speaks and sys.stderr.isatty()  # a log file gets a line an epoch
        with tqdm(total=self.total, initial=run.step, desc=run.name, disable=not bars) as bar:
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
                    if speaks and not bars:
                        print(run.line(args.epochs), file=sys.stderr, flush=True)
                ended = ranks.on_any(asked.made, args.device)
                every = args.checkpoint_every
                due = every and (run.step % every == 0 or run.step == self.total)
                if main_rank and (due or ended):
                    self.save()
                if ended:
                    raise stop.Stopped
        if main_rank:
            self.best.restore()
            if args.refit:
                self.refit()
            cuts = args.cut if run.name == "base" else ()
            run.score(self.split, args.workers, cuts, args.matryoshka_dims, args.nmi)
            log.write(run.rows())
            log.close()
            if asked.made:
                self.save()
                raise stop.Stopped
        return run

    def batch(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Forward and backward; the loss and its terms."""
        loss = self.forward(pixels.to(self.args.device), labels.to(self.args.device))
        self.stepper.backward(loss / self.args.accumulate)
        return {"loss": loss.item(), **report.components(self.loss_func)}

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch on the device."""
        if self.args.channels_last:
            pixels = pixels.to(memory_format=torch.channels_last)
        with self.stepper.autocast():
            embeddings = self.embed(pixels)
        s2sd = isinstance(self.loss_func, S2SDLoss)  # which knows what to do under autocast
        with self.stepper.autocast(enabled=s2sd):
            embeddings = embeddings if s2sd else embeddings.float()
            pairs = self.miner(embeddings, labels) if self.miner else None
            loss: torch.Tensor = self.objective(embeddings, labels, pairs, **self.taught(pixels))
        return loss

    def taught(self, pixels: torch.Tensor) -> dict[str, Any]:
        """What the outside teacher makes of these images."""
        return {"teachers": {"teacher": self.teacher(pixels)}} if self.teacher else {}

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
