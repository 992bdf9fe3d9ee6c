"""The command line of the example trainer."""

from __future__ import annotations

import argparse
import ast
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import config, ranks
from .backbones import MAKERS
from .image_sets import SETS
from .reach import PAPERS, WAYS

DIMS = (256, 512)
SIZES = {"icons400": 32, "emoji": 64}  # of images that have one
FEATURE_DISTILL_WEIGHT = 10.0
EPILOG = """\
The settings of the authors' sample run for CUB200-2011 with ResNet50 and 128 dimensions:
  python examples/train.py --recipe cub-r50-128-msim --root DIR
See what it would do first with --dry-run, and try it on fewer epochs: later flags win. The other
recipes, files in examples/recipes, are
  {recipes}

Those of the authors' sample runs hold the paper's settings: --variant msdfa
--dims 512 1024 1536 2048 --distill-weight 50 --feature-distill-weight 50
--feature-distill-delay 1000 --lr 1e-5 --weight-decay 4e-4 --batch-size 112 and so on.
Without a recipe the settings are for a network of 0.1 million parameters, trained for half a
minute on icons-400. The schedule and the weights were chosen on classes held out from training, as
--validation does; the other settings are first choices. Results repeat exactly at the same number
of --threads only.

torchrun --nproc_per_node=2 examples/train.py does the same on two processes, with the same flags.
"""


def key_value(text: str) -> tuple[str, Any]:
    """``alpha=2`` -> ("alpha", 2). What is no Python literal stays a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def switch(default: bool = False) -> dict[str, Any]:
    """A flag with its negation, so that a file's can be taken back."""
    return {"action": argparse.BooleanOptionalAction, "default": default}


def count(text: str) -> int:
    """A whole number, 0 or above."""
    return 0 if text.isdecimal() and int(text) == 0 else positive(text)


def decay(text: str) -> float:
    """A number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def rate(text: str) -> float:
    """A finite number, 0 or above."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or above")
    return value


class Parser(argparse.ArgumentParser):
    """Rank 0 speaks for all."""

    def print_help(self, file: Any = None) -> None:
        if ranks.rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        if ranks.rank():  # rank 0 has the same flags: it tells, and torchrun ends the others
            time.sleep(10)
        self.exit(2, f"{self.prog}: error: {message}\nAll flags: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All flags, with the defaults of the demonstration."""
    main = Parser(
        description="Train a base loss and S2SD with the same seed and budget, and compare them on "
        "unseen classes.",
        epilog=EPILOG.format(recipes="\n  ".join(config.names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a recipe's flags must not change what an abbreviation means
    )
    for flags in (
        _files,
        _data,
        _network,
        _base_loss,
        _s2sd,
        _beyond,
        _baselines,
        _training,
        _machine,
        _output,
    ):
        flags(main)
    return main


def _files(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("settings from files; flags given beside them win").add_argument
    add("--recipe", metavar="NAME", help="one of those below")
    add("--config", type=Path, metavar="FILE", help="of your own: YAML, flag: value")
    add("--dry-run", **switch(), help="print settings and counts of the data, and end")


def _data(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("data").add_argument
    add("--dataset", choices=SETS, default="icons400", help="default: %(default)s")
    add("--root", type=Path, help="folder or table of the images; for emoji, the cache")
    add("--image-size", type=positive, help="pixels of files; default: 224")
    add("--workers", type=count, default=0, help="processes that load; default: %(default)s")
    add(
        "--validation",
        **switch(),
        help="evaluate on held-out training classes, to choose settings",
    )
    add(
        "--choose-epoch",
        **switch(),
        help="test the epoch that is best on held-out training classes",
    )

    add(
        "--validation-share",
        type=float,
        default=0.2,
        help="of the training classes, held out; default: %(default)s",
    )


def _network(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("network").add_argument
    add(
        "--backbone",
        default="cnn",
        metavar="NAME",
        help=f"{', '.join(MAKERS)} or a name of timm; default: %(default)s",
    )
    add("--embedding-size", type=positive, default=16, help="default: %(default)s, paper: 128")
    add("--weights", type=Path, metavar="FILE", help="state_dict of the backbone")
    add(
        "--pretrained",
        **switch(True),
        help="the backbone's own weights; default: yes",
    )
    add(
        "--freeze-bn",
        **switch(),
        help="keep the statistics of batch norm, as the paper does",
    )


def _base_loss(main: argparse.ArgumentParser) -> None:
    group = main.add_argument_group("base loss, by class name of pytorch-metric-learning")
    add = group.add_argument
    pairs = {"type": key_value, "nargs": "+", "default": [], "metavar": "NAME=VALUE"}
    add("--loss", default="MultiSimilarityLoss", metavar="CLASS", help="default: %(default)s")
    add(
        "--loss-args",
        **pairs,
        help="keyword arguments, such as alpha=2 beta=50; num_classes=auto is the data's",
    )
    add("--miner", default="MultiSimilarityMiner", metavar="CLASS", help="or none; as above")
    add("--miner-args", **pairs, help="keyword arguments, such as epsilon=0.1")


def _s2sd(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("S2SD").add_argument
    add(
        "--variant",
        default="msdf",
        choices=("dsd", "msd", "msdf", "msdfa"),
        help="one head; several; and feature distillation; and max pooling; default: %(default)s",
    )
    add(
        "--dims",
        type=positive,
        nargs="*",
        metavar="D",
        help=f"dimensions of the heads, none for no heads; default: {' '.join(map(str, DIMS))}, or "
        "the last for dsd",
    )
    add("--linear-heads", **switch(), help="heads of one linear layer, in the place of two")
    add("--temperature", type=float, default=1.0, help="default: %(default)s")
    add("--distill-weight", type=float, default=10.0, help="γ; default: %(default)s, paper: 50")
    add(
        "--feature-distill-weight",
        type=float,
        help=f"γ_f; default: {FEATURE_DISTILL_WEIGHT}, paper: 50",
    )
    add(
        "--feature-distill-delay",
        type=count,
        default=100,
        help="step at which feature distillation starts; default: %(default)s, paper: 1000",
    )
    add(
        "--ramp",
        type=count,
        nargs=2,
        metavar=("FROM", "TO"),
        help="steps between which γ and γ_f rise from 0; default: full from the start",
    )
    add(
        "--exclude-self",
        **switch(),
        help="leave self-similarities out of the softmaxes",
    )
    add(
        "--reach",
        default=PAPERS,
        choices=WAYS,
        help="how far the KL's gradient goes: into the trunk, as in the paper; no further than the "
        "embedder; into the teachers as well; or detached, the base loss's no further than the "
        "embedder either; default: %(default)s",
    )


def _beyond(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("beyond the paper").add_argument
    add(
        "--matryoshka-dims",
        type=positive,
        nargs="+",
        default=[],
        metavar="D",
        help="the first D dimensions of the embeddings are trained and tested too, in both runs",
    )
    add(
        "--teacher",
        metavar="FILE|NAME",
        help="S2SD run: an exported model, or a pretrained backbone such as lite2, teaches as well",
    )
    add("--teacher-weight", type=rate, default=50.0, help="its weight; default: %(default)s")


def _baselines(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("what one would try instead").add_argument
    sizes: dict[str, Any] = {"type": positive, "nargs": "+", "default": [], "metavar": "D"}
    add("--cut", **sizes, help="test the embeddings cut to D too, plainly and by PCA")
    add(
        "--refit",
        type=positive,
        metavar="STEPS",
        help="test an embedder fitted anew to the features of the trained trunk too, and export it",
    )
    add("--refit-weight", type=rate, help="S2SD run: γ in it; default: --distill-weight")


def _training(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("training, the same for both runs").add_argument
    add("--epochs", type=positive, default=20, help="default: %(default)s, paper: 150")
    add(
        "--steps-per-epoch",
        type=positive,
        help="default: as many batches as the images fill; 50 for icons400",
    )
    add(
        "--batch-size",
        type=positive,
        default=128,
        help="of all processes together; default: %(default)s, paper: 112",
    )
    add("--per-class", type=positive, default=4, help="in a batch; default: %(default)s, paper: 2")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches of a step; default: 1")
    add("--optimizer", choices=("adam", "adamw"), default="adam", help="default: %(default)s")
    add("--lr", type=rate, default=3e-3, help="default: %(default)s, paper: 1e-5")
    add("--embedder-lr", type=rate, help="of the embedder; default: --lr")
    add("--head-lr", type=rate, help="of the auxiliary heads; default: --lr")
    add("--loss-lr", type=rate, help="of proxies and other loss parameters; default: --lr")
    add("--weight-decay", type=rate, default=4e-4, help="of the network; default: %(default)s")
    add("--head-weight-decay", type=rate, default=0.0, help="default: %(default)s")
    add(
        "--schedule",
        choices=("cosine", "constant", "multistep"),
        default="cosine",
        help="of the learning rate; default: %(default)s, paper: constant",
    )
    add("--warmup", type=count, default=0, metavar="STEPS", help="a linear rise; default: none")
    add("--milestones", type=positive, nargs="+", default=[], metavar="EPOCH", help="of multistep")
    add("--lr-gamma", type=float, help="of multistep; default: 0.3")
    add("--clip-grad", type=float, metavar="NORM", help="of the network's gradient")
    add("--ema", type=decay, metavar="DECAY", help="test the moving average of the network")
    add("--seed", type=count, default=0, help="default: %(default)s")


def _machine(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, help="CPU threads of PyTorch; default: its own choice")
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="default: %(default)s")
    add(
        "--channels-last",
        **switch(True),
        help="layout of the network's tensors; default: yes",
    )
    add(
        "--compile",
        **switch(),
        help="torch.compile the trunk",
    )


def _output(main: argparse.ArgumentParser) -> None:
    add = main.add_argument_group("what to run and where to write").add_argument
    add("--baseline-only", **switch(), help="train the base loss alone")
    add("--s2sd-only", **switch(), help="train S2SD alone")
    add("--output", type=Path, help="default: runs/DATASET")
    add("--export", type=Path, metavar="FILE", help="write the deployable model, without heads")
    add(
        "--checkpoint-every",
        type=positive,
        metavar="N",
        help="write a checkpoint to --output every N steps, and keep the last two of each run",
    )
    add(
        "--resume",
        **switch(),
        help="go on from the newest whole checkpoints in --output, with the same settings",
    )
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases as well")
    add("--nmi", **switch(True), help="measure NMI, slow for many classes; default: yes")
    add("--report", **switch(True), help="pictures and report.html; default: yes")
    add("--quiet", **switch(), help="no progress bars")


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
    if not distils_features and args.feature_distill_weight:
        main.error(
            f"--feature-distill-weight is for msdf and msdfa, not for --variant {args.variant}"
        )
    if args.variant == "dsd" and len(args.dims or DIMS[-1:]) > 1:
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
    if args.dims is None:
        args.dims = DIMS[-1:] if args.variant == "dsd" else DIMS
    if args.feature_distill_weight is None:
        args.feature_distill_weight = FEATURE_DISTILL_WEIGHT if distils_features else 0.0
    if args.refit and args.refit_weight is None:
        args.refit_weight = args.distill_weight
    if args.steps_per_epoch is None and args.dataset == "icons400":
        args.steps_per_epoch = 50
    args.image_size = args.image_size or SIZES.get(args.dataset, 224)
    args.output = args.output or Path("runs") / args.dataset
    args.loss_args, args.miner_args = dict(args.loss_args), dict(args.miner_args)
    for rate in ("embedder_lr", "head_lr", "loss_lr"):
        if getattr(args, rate) is None:
            setattr(args, rate, args.lr)
    return args
