"""Train a base loss and S2SD on icons-400 and compare them on unseen classes.

    python examples/train.py
    python examples/train.py --loss ProxyAnchorLoss --miner none --loss-lr 0.03
    torchrun --nproc_per_node=2 examples/train.py
    python examples/train.py --help

Writes metrics.csv, table.md, config.json, pictures, and report.html with all of them, to
``--output``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import checkpoint
import export
import icons
import options
import page
import plots
import ranks
import report
import spaces
import torch
from by_name import make_loss, make_miner
from evaluate import apply, evaluate, recall_at_k
from network import Network
from report import Run
from torch import nn
from tqdm import tqdm

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import S2SDError

CHECKPOINTS = "checkpoints"
LossAndMiner = tuple[nn.Module, "nn.Module | None"]


def pml_loss(args: argparse.Namespace, num_classes: int) -> LossAndMiner:
    """The plain PML loss, and the miner that goes with it."""
    loss_func = make_loss(args.loss, args.loss_args, num_classes, args.embedding_size)
    return loss_func, make_miner(args.miner, args.miner_args)


def base_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """That loss as it is. Over several ranks S2SDLoss without S2SD brings the batch together."""
    loss_func, miner = pml_loss(args, num_classes)
    if ranks.world() == 1:
        return loss_func, miner
    whole = S2SDLoss(loss_func, miner, head_dims=(), feature_weight=0, gather_distributed=True)
    return whole, None


def s2sd_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """The same loss and miner inside S2SDLoss, which mines for itself."""
    features: dict[str, Any] = {"embedder": model.embedder}
    if args.variant == "msdfa":  # max pooling needs the feature map
        features = {"trunk": model.trunk, "feature_dim": model.embedder.in_features}
    make = getattr(S2SDLoss, args.variant)
    loss_func = make(
        *pml_loss(args, num_classes),
        **features,
        head_dims=args.dims,
        weight=args.weight,
        temperature=args.temperature,
        feature_weight=args.feature_weight,
        feature_delay=args.feature_delay,
        exclude_self=args.exclude_self,
        gather_distributed=ranks.world() > 1,
    )
    return loss_func, None


def make_optimizer(
    args: argparse.Namespace, model: nn.Module, loss_func: nn.Module
) -> torch.optim.Optimizer:
    """Adam over the model and over what parameters the loss has: heads, proxies, a margin."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    if isinstance(loss_func, S2SDLoss):
        loss_func.add_to(optimizer, lr=args.head_lr, loss_lr=args.loss_lr)
    elif parameters := list(loss_func.parameters()):
        optimizer.add_param_group({"params": parameters, "lr": args.loss_lr, "weight_decay": 0.0})
    return optimizer


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Of the learning rate, by step. Built after the heads joined the optimizer."""
    if args.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def train(
    name: str,
    losses: Callable[..., LossAndMiner],
    args: argparse.Namespace,
    seen: icons.Icons,
    unseen: icons.Icons,
    settings: dict[str, Any],
    states: dict[str, Any] | None,
) -> Run:
    """One run, from its start or from the states of a checkpoint.

    Seeds are set first: both runs have the same start, batches and augmentation.
    """
    checkpoint.seed(args.seed)
    model = ranks.synchronised(Network(args.embedding_size).to(args.device))
    loss_func, miner = losses(args, model, len(seen.names))
    loss_func.to(args.device)
    optimizer = make_optimizer(args, model, loss_func)
    batches = icons.Batches(seen, args.batch_size, args.per_class, args.steps_per_epoch, args.seed)
    total = args.epochs * args.steps_per_epoch
    schedule = make_schedule(args, optimizer, total)
    augment = icons.RandomAffine(args.seed)
    run = Run(name, model, loss_func)
    embed, objective = ranks.parallel(model), ranks.parallel(loss_func)
    main_rank = ranks.rank() == 0
    parts = {
        "run": run,
        "model": model,
        "loss_func": loss_func,
        "optimizer": optimizer,
        "schedule": schedule,
        "batches": batches,
        "augment": augment,
        "random": checkpoint.RandomStates(),
    }
    for part, state in (states or {}).items():
        parts[part].load_state_dict(state)
    ranks.agree(run.step, args.device)

    silent = args.quiet or not main_rank
    with tqdm(total=total, initial=run.step, desc=f"{name:4}", disable=silent) as bar:
        while run.step < total:
            start = time.perf_counter()
            images, labels = next(batches)  # the global batch, of which a rank takes its rows
            images = ranks.own(augment(images.to(args.device)))
            labels = ranks.own(labels).to(args.device)
            embeddings = embed(images)
            pairs = miner(embeddings, labels) if miner else None
            loss = objective(embeddings, labels, pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.step += 1
            run.recorded.append({"loss": loss.item(), **report.components(loss_func)})
            bar.set_postfix({k: f"{v:.3g}" for k, v in run.recorded[-1].items()}, refresh=False)
            bar.update()
            run.seconds += time.perf_counter() - start
            if run.step % args.steps_per_epoch == 0:
                run.end_epoch()
                if run.step < total and main_rank:
                    run.record(recall_at_k(apply(model, unseen.images), unseen.labels, ks=(1,)))
            every = args.checkpoint_every if main_rank else None
            if every and (run.step % every == 0 or run.step == total):
                checkpoint.save(args.output / CHECKPOINTS, name, run.step, settings, parts)
    if main_rank:
        run.scores = final_scores(run, unseen)
    for who, scores in run.scores.items():
        run.record(scores, who)
    return run


def final_scores(run: Run, unseen: icons.Icons) -> dict[str, dict[str, float]]:
    """All metrics of the model and, for S2SD, of every head as if it were the embedder."""
    scores = {run.name: evaluate(apply(run.model, unseen.images), unseen.labels)}
    if isinstance(run.loss_func, S2SDLoss):
        with torch.no_grad():
            teachers = run.loss_func.project(apply(run.model.trunk, unseen.images))
        for dim, embeddings in teachers.items():
            scores[f"head {dim}"] = evaluate(embeddings, unseen.labels)
    return scores


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, train both runs, evaluate, write and print."""
    parser = options.parser()
    args = options.parse(parser, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    seen, unseen = icons.split(icons.load(), args.validation)
    makers = {"base": base_loss, "S2SD": s2sd_loss}
    if args.baseline_only or args.s2sd_only:
        del makers["S2SD" if args.baseline_only else "base"]
    folder = args.output / CHECKPOINTS
    try:  # build everything once: what is wrong with the flags shows before any training
        ranks.check(args.device, args.batch_size)
        for make in makers.values():
            make(args, Network(args.embedding_size), len(seen.names))
        icons.Batches(seen, args.batch_size, args.per_class, args.steps_per_epoch, args.seed)
        settings = report.settings(args)
        states = dict.fromkeys(makers)
        if args.resume:
            states = {name: checkpoint.newest(folder, name, settings) for name in makers}
        elif args.checkpoint_every and checkpoint.files(folder):
            raise ValueError(f"{folder} holds checkpoints: add --resume, or use another --output")
        if args.export and args.export.is_dir():
            raise ValueError(f"--export {args.export} is a folder: name a file")
        args.output.mkdir(parents=True, exist_ok=True)
    except (S2SDError, ValueError, OSError) as error:
        parser.error(str(error))

    args.device = ranks.start(args.device)
    unseen = unseen.to(args.device)
    runs = [
        train(name, make, args, seen, unseen, settings, states[name])
        for name, make in makers.items()
    ]
    ranks.stop()
    if ranks.rank() == 0:
        report.write(args, runs, unseen)
        if not args.no_report:
            plots.recall(runs, args.output / "recall.png")
            plots.retrieval(runs, unseen, args.output / "retrieval.png", seed=args.seed)
            spaces.draw(runs, seen.to(args.device), unseen, args.output, seed=args.seed)
            page.write(args.output)
        print(report.title(args, unseen), report.table(runs), sep="\n\n")
        print(f"\nMetrics and configuration are in {args.output}", end="")
        print("" if args.no_report else ", with pictures in report.html")
        if args.export:
            export.write(runs[-1].model, args.export, unseen.images)
            print(f"The {runs[-1].name} model, loaded back and compared, is in {args.export}")


if __name__ == "__main__":
    main()
