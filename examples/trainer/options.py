"""The command line of the example trainer."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from s2sd_pml import S2SDLoss

from . import config
from .backbones import MAKERS
from .flags import Parser, count, decay, key_value, positive, rate, switch
from .image_sets import SETS
from .reach import PAPERS, WAYS

S2SD = S2SDLoss.recipe("from-scratch")  # the defaults, for icons-400
DIMS = tuple(S2SD["head_dims"])
SEEDS = (0, 1, 2, 3)  # of the demonstration
SIZES = {"icons400": 32, "emoji": 64}  # of images that have one
USAGE = "%(prog)s [--recipe NAME] [--config FILE] [--flag VALUE ...]"
EPILOG = """\
Every switch has a negation: --freeze-bn and --no-freeze-bn. Later flags win over earlier ones, and
typed ones over those of a recipe or file. Recipes, for --recipe NAME, are
{recipes}
Those that start with cub-, cars- and sop- are the authors' sample runs with the paper's settings
(--dims 512 1024 1536 2048 --distill-weight 50 ...). The defaults are for a network of 0.1 million
parameters that is trained on icons-400 for 900 steps.
torchrun --nproc_per_node=2 examples/train.py runs two processes with the same flags and batches.
"""


def parser() -> argparse.ArgumentParser:
    """All flags, with the defaults of the demonstration."""
    recipes = textwrap.indent(textwrap.fill(", ".join(config.names()), 96), "  ")
    main = Parser(
        description="Train a base loss and S2SD with the same seed and budget, and compare them on "
        "unseen classes. Defaults are in brackets.",
        usage=USAGE,
        epilog=EPILOG.format(recipes=recipes),
    )
    groups = (_files, _data, _network, _base_loss, _s2sd, _beyond, _training, _machine, _output)
    for flags in groups:
        flags(main)
    _study(main, shown=False)
    return main


def study_help() -> str:
    """The flags that only the study uses, which the trainer takes but does not list."""
    alone = Parser(add_help=False, usage=argparse.SUPPRESS)
    _study(alone, shown=True)
    return f"All other flags are those of train.py; for the study there are\n{alone.format_help()}"


def _files(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("settings from files").add_argument
    add("--recipe", metavar="NAME", help="settings that come with the project, listed below")
    add("--config", type=Path, metavar="FILE", help="your own, in YAML; or config.json of a run")
    add("--dry-run", **switch(), help="print settings and counts of the data, train nothing")


def _data(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("data").add_argument
    sets = " ".join(SETS)
    add("--dataset", choices=SETS, default="icons400", metavar="NAME", help=sets)
    add("--root", type=Path, metavar="PATH", help="of the images; emoji: cache; icons400: a file")
    add("--image-size", type=positive, metavar="PIXELS", help="of files [224]")
    add("--workers", type=count, default=0, metavar="N", help="processes that load images")
    add("--validation", **switch(), help="test on held-out training classes, to choose settings")
    add("--choose-epoch", **switch(), help="test the epoch that is best on held-out classes")
    add(
        "--validation-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the training classes that are held out",
    )


def _network(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("network").add_argument
    backbones = f"{', '.join(MAKERS)} or a name of timm"
    add("--backbone", default="cnn", metavar="NAME", help=backbones)
    add("--embedding-size", type=positive, default=16, metavar="D", help="paper: 128")
    add("--weights", type=Path, metavar="FILE", help="state_dict of the backbone")
    add("--pretrained", **switch(True), help="random weights of the backbone")
    add("--freeze-bn", **switch(), help="keep the statistics of batch norm, as the paper does")


def _base_loss(main: argparse.ArgumentParser) -> None:
    group = main.add_argument_group("base loss, by class name of pytorch-metric-learning")
    add = group.add_argument
    pairs = {"type": key_value, "nargs": "+", "default": [], "metavar": "NAME=VALUE"}
    add("--loss", default="MultiSimilarityLoss", metavar="CLASS", help="or another")
    add("--loss-args", **pairs, help="such as alpha=2; num_classes=auto is the data's")
    add("--miner", default="MultiSimilarityMiner", metavar="CLASS", help="or none")
    add("--miner-args", **pairs, help="such as epsilon=0.1")


def _s2sd(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("S2SD").add_argument
    variants = ("dsd", "msd", "msdf", "msdfa")
    add("--variant", default="msdf", choices=variants, metavar="NAME", help=", ".join(variants))
    dims = f"of the heads, none for no heads [{' '.join(map(str, DIMS))}; dsd: the last]"
    add("--dims", type=positive, nargs="*", metavar="D", help=dims)
    add("--linear-heads", **switch(True), help="heads of two layers, as in the paper")
    temperature = {"type": float, "default": S2SD["temperature"], "metavar": "T"}
    add("--temperature", **temperature, help="of the softmaxes, paper: 1")
    weight = {"type": float, "default": S2SD["distill_weight"], "metavar": "γ"}
    add("--distill-weight", **weight, help="of heads, paper: 50")
    weight = f"of features, for msdf and msdfa, paper: 50 [{S2SD['feature_distill_weight']}]"
    add("--feature-distill-weight", type=float, metavar="γ_f", help=weight)
    add(
        "--feature-distill-delay",
        type=count,
        default=S2SD["feature_distill_delay"],
        metavar="STEP",
        help="where feature distillation starts, paper: 1000",
    )
    add("--exclude-self", **switch(True), help="self-similarities in the softmax, as the paper")


def _beyond(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("beyond the paper").add_argument
    prefixes: dict[str, Any] = {"type": positive, "nargs": "+", "default": [], "metavar": "D"}
    add("--matryoshka-dims", **prefixes, help="train and test the first D dimensions too")
    teacher = "S2SD run: an exported model, or a backbone such as lite2"
    add("--teacher", metavar="FILE|NAME", help=teacher)
    add("--teacher-weight", type=rate, default=50.0, metavar="γ_t", help="of --teacher")
    refit = "also test a refitted embedder for the trained trunk, and export it"
    add("--refit", type=positive, metavar="STEPS", help=refit)


def _training(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("training, the same for both runs").add_argument
    add("--epochs", type=positive, default=18, metavar="N", help="paper: 150")
    steps = "[as many batches as the images fill; icons400: 50]"
    add("--steps-per-epoch", type=positive, metavar="N", help=steps)
    batch = "of all processes together, paper: 112"
    add("--batch-size", type=positive, default=128, metavar="N", help=batch)
    add("--per-class", type=positive, default=4, metavar="N", help="in a batch, paper: 2")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches of a step")
    add("--optimizer", choices=("adam", "adamw"), default="adam", metavar="NAME", help="or adamw")
    add("--lr", type=rate, default=3e-3, metavar="RATE", help="paper: 1e-5")
    add("--embedder-lr", type=rate, metavar="RATE", help="of the embedder [--lr]")
    add("--head-lr", type=rate, metavar="RATE", help="of the auxiliary heads [--lr]")
    add("--loss-lr", type=rate, metavar="RATE", help="of proxies and other parameters [--lr]")
    add("--weight-decay", type=rate, default=4e-4, metavar="RATE", help="of the network")
    add("--head-weight-decay", type=rate, default=0.0, metavar="RATE", help="of the heads")
    schedules = ("cosine", "constant", "multistep")
    add(
        "--schedule",
        choices=schedules,
        default="cosine",
        metavar="NAME",
        help=f"{', '.join(schedules)}; paper: constant",
    )
    add("--warmup", type=count, default=0, metavar="STEPS", help="a linear rise of the rate")
    add("--milestones", type=positive, nargs="+", default=[], metavar="EPOCH", help="of multistep")
    add("--lr-gamma", type=float, metavar="FACTOR", help="of multistep [0.3]")
    add("--clip-grad", type=float, metavar="NORM", help="of the network's gradient")
    add("--ema", type=decay, metavar="DECAY", help="test the moving average of the network")
    several = "means over several [0; without any flag 0 1 2 3]"
    add("--seed", "--seeds", type=count, nargs="+", metavar="N", dest="seeds", help=several)


def _machine(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("machine").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, metavar="NAME", help="cpu, cuda or another of PyTorch")
    add("--threads", type=positive, metavar="N", help="of PyTorch; results repeat with the same N")
    precision = "none, bf16 or fp16"
    add("--amp", choices=("none", "bf16", "fp16"), default="none", metavar="TYPE", help=precision)
    add("--channels-last", **switch(True), help="the default layout of tensors")
    add("--compile", **switch(), help="torch.compile the trunk")


def _output(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("what to run and where to write").add_argument
    add("--baseline-only", **switch(), help="train the base loss alone")
    add("--s2sd-only", **switch(), help="train S2SD alone")
    add("--output", type=Path, metavar="FOLDER", help="[runs/DATASET]")
    add("--export", type=Path, metavar="FILE", help="write the deployable model, without heads")
    every = "write a checkpoint every N steps, keep the last two"
    add("--checkpoint-every", type=positive, metavar="N", help=every)
    add("--resume", **switch(), help="go on from the newest checkpoints in --output")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases as well")
    add("--nmi", **switch(True), help="leave out NMI, which is slow for many classes")
    add("--report", **switch(True), help="no pictures, no report.html")
    add("--quiet", **switch(), help="no progress")


def _study(main: argparse.ArgumentParser, shown: bool) -> None:
    """What only examples/study/ uses."""
    add = main.add_argument_group().add_argument

    def said(text: str) -> str:
        return text if shown else argparse.SUPPRESS

    add(
        "--cut",
        type=positive,
        nargs="+",
        default=[],
        metavar="D",
        help=said("base run: test the embeddings cut to D too, plainly and by PCA"),
    )
    add("--refit-weight", type=rate, metavar="γ", help=said("of --refit [--distill-weight]"))
    add(
        "--ramp",
        type=count,
        nargs=2,
        metavar=("FROM", "TO"),
        help=said("steps between which γ and γ_f rise from 0"),
    )
    add(
        "--reach",
        default=PAPERS,
        choices=WAYS,
        metavar="WHERE",
        help=said(
            "how far the KL's gradient goes: trunk, as in the paper; embedder, no further; "
            "teachers, these as well; detached, the base loss's no further than the embedder either"
        ),
    )


def parse(main: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, fill in what depends on other flags, and refuse contradictions."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = main.parse_args(config.command_line(argv))
    except ValueError as error:
        main.error(str(error))
    distils_features = args.variant in ("msdf", "msdfa")
    if args.baseline_only and args.s2sd_only:
        main.error("--baseline-only and --s2sd-only leave nothing to train: give one of them")
    if args.validation and args.choose_epoch:
        main.error("--validation tests no epoch on the test classes, --choose-epoch does: give one")
    if not distils_features and "--feature-distill-weight" not in argv:
        args.feature_distill_weight = 0.0  # that of a file fits every variant
    if not distils_features and args.feature_distill_weight:
        main.error(
            f"--feature-distill-weight is for msdf and msdfa, not for --variant {args.variant}"
        )
    if args.dims is None:
        args.dims = DIMS
    if args.variant == "dsd" and "--dims" not in argv:
        args.dims = args.dims[-1:]
    if args.variant == "dsd" and len(args.dims) != 1:
        main.error("--variant dsd has one head: give one of --dims, or use --variant msd")
    if args.ramp and args.ramp[0] >= args.ramp[1]:
        main.error(f"--ramp {args.ramp[0]} {args.ramp[1]}: the second step must be the later one")
    if (args.schedule == "multistep") != bool(args.milestones):
        main.error("--schedule multistep and --milestones EPOCH ... go together")
    if args.reach != PAPERS and (args.variant == "msdfa" or args.teacher or args.baseline_only):
        main.error(f"--reach {args.reach} is for the S2SD run of dsd, msd and msdf, with heads")
    if args.teacher and args.baseline_only:
        main.error("--teacher is for the S2SD run, not with --baseline-only")
    if wrong := [d for d in args.matryoshka_dims if d >= args.embedding_size]:
        main.error(
            f"--matryoshka-dims {wrong[0]} is no prefix of --embedding-size {args.embedding_size}"
        )
    if args.refit and args.matryoshka_dims:
        main.error("--refit fits one size: not with --matryoshka-dims")
    if args.refit_weight is not None and not args.refit:
        main.error("--refit-weight is for --refit")
    if large := [cut for cut in args.cut if cut > args.embedding_size]:
        main.error(f"--cut {large[0]} is more than --embedding-size {args.embedding_size}")
    if args.image_size and args.image_size != SIZES.get(args.dataset, args.image_size):
        main.error(f"--image-size {args.image_size}: {args.dataset} has {SIZES[args.dataset]}")
    if args.lr_gamma is not None and args.schedule != "multistep":
        main.error("--lr-gamma is for --schedule multistep")
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        main.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.weights is not None and not args.weights.exists():
        main.error(f"--weights {args.weights} does not exist")
    if args.feature_distill_weight is None:
        args.feature_distill_weight = float(S2SD["feature_distill_weight"])
    if args.refit and args.refit_weight is None:
        args.refit_weight = args.distill_weight
    if args.steps_per_epoch is None and args.dataset == "icons400":
        args.steps_per_epoch = 50
    if args.seeds is None:
        args.seeds = [0] if argv else [*SEEDS]
    if len(set(args.seeds)) < len(args.seeds):
        main.error(f"--seeds {' '.join(map(str, args.seeds))} repeats a seed")
    args.seed = args.seeds[0]
    args.image_size = args.image_size or SIZES.get(args.dataset, 224)
    args.output = args.output or Path("runs") / args.dataset
    args.loss_args, args.miner_args = dict(args.loss_args), dict(args.miner_args)
    for name in ("embedder_lr", "head_lr", "loss_lr"):
        if getattr(args, name) is None:
            setattr(args, name, args.lr)
    return args
