"""The command line of the example trainer."""

from __future__ import annotations

import argparse
import ast
import time
from pathlib import Path
from typing import Any, NoReturn

import ranks
import torch

DIMS = (256, 512)
FEATURE_WEIGHT = 10.0
EPILOG = """\
The paper's settings (ResNet50 on CUB200-2011 and Cars196, 150 epochs) are
  --variant msdf --dims 512 1024 1536 2048 --temperature 1 --weight 50 --feature-weight 50
  --feature-delay 1000 --lr 1e-5 --weight-decay 4e-4 --batch-size 112 --per-class 2
The defaults above are for a network of 0.1 million parameters, trained for half a minute. The
schedule and the weights were chosen on classes held out from training, as --validation does; the
other settings are first choices. Results repeat exactly at the same number of --threads only.

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


class Parser(argparse.ArgumentParser):
    """Rank 0 speaks for all."""

    def print_help(self, file: Any = None) -> None:
        if ranks.rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        if ranks.rank():  # rank 0 has the same flags: it tells, and torchrun ends the others
            time.sleep(10)
        super().error(message)


def parser() -> argparse.ArgumentParser:
    """All flags, with the defaults of the demonstration."""
    main = Parser(
        description="Train a base loss and S2SD on icons-400 with the same seed and budget, and "
        "compare them on unseen classes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def group(title: str) -> Any:
        return main.add_argument_group(title).add_argument

    pairs = {"type": key_value, "nargs": "+", "default": [], "metavar": "NAME=VALUE"}
    add = group("base loss, by class name of pytorch-metric-learning")
    add("--loss", default="MultiSimilarityLoss", metavar="CLASS", help="default: %(default)s")
    add("--loss-args", **pairs, help="keyword arguments, such as alpha=2 beta=50")
    add(
        "--miner",
        default="MultiSimilarityMiner",
        metavar="CLASS",
        help="or none; default: %(default)s",
    )
    add("--miner-args", **pairs, help="keyword arguments, such as epsilon=0.1")

    add = group("S2SD")
    add(
        "--variant",
        default="msdf",
        choices=("dsd", "msd", "msdf", "msdfa"),
        help="one head; several; and feature distillation; and max pooling; default: %(default)s",
    )
    add(
        "--dims",
        type=positive,
        nargs="+",
        metavar="D",
        help=f"dimensions of the heads; default: {' '.join(map(str, DIMS))}, or the last for dsd",
    )
    add("--temperature", type=float, default=1.0, help="default: %(default)s")
    add(
        "--weight",
        type=float,
        default=10.0,
        help="of the heads' distillation; default: %(default)s, paper: 50",
    )
    add(
        "--feature-weight",
        type=float,
        help=f"of feature distillation; default: {FEATURE_WEIGHT}, paper: 50",
    )
    add(
        "--feature-delay",
        type=int,
        default=100,
        help="step at which feature distillation starts; default: %(default)s, paper: 1000",
    )
    add("--exclude-self", action="store_true", help="leave self-similarities out of the softmaxes")

    add = group("training, the same for both runs")
    add("--epochs", type=positive, default=20, help="default: %(default)s")
    add("--steps-per-epoch", type=positive, default=50, help="default: %(default)s")
    add(
        "--batch-size",
        type=positive,
        default=128,
        help="of all processes together; default: %(default)s, paper: 112",
    )
    add(
        "--per-class",
        type=positive,
        default=4,
        help="images of a class in a batch; default: %(default)s, paper: 2",
    )
    add("--lr", type=float, default=3e-3, help="default: %(default)s, paper: 1e-5")
    add(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="of the learning rate; default: %(default)s, paper: constant",
    )
    add("--head-lr", type=float, help="of the auxiliary heads; default: --lr")
    add("--loss-lr", type=float, help="of proxies and other loss parameters; default: --lr")
    add("--weight-decay", type=float, default=4e-4, help="of the network; default: %(default)s")
    add("--embedding-size", type=positive, default=16, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, help="CPU threads of PyTorch; default: its own choice")

    add = group("what to run and where to write")
    add("--baseline-only", action="store_true", help="train the base loss alone")
    add("--s2sd-only", action="store_true", help="train S2SD alone")
    add(
        "--validation",
        action="store_true",
        help="hold out 40 training classes and evaluate on them, to choose settings",
    )
    add("--output", type=Path, default=Path("runs/icons400"), help="default: %(default)s")
    add("--export", type=Path, metavar="FILE", help="write the deployable model, without heads")
    add(
        "--checkpoint-every",
        type=positive,
        metavar="N",
        help="write a checkpoint to --output every N steps, and keep the last two of each run",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoints in --output, with the same settings",
    )
    add("--no-report", action="store_true", help="no pictures and no report.html")
    add("--quiet", action="store_true", help="no progress bars")
    return main


def parse(main: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, fill in what depends on other flags, and refuse contradictions."""
    args = main.parse_args(argv)
    distils_features = args.variant in ("msdf", "msdfa")
    if args.batch_size % args.per_class:
        main.error(f"--batch-size {args.batch_size} is no multiple of --per-class {args.per_class}")
    if args.baseline_only and args.s2sd_only:
        main.error("--baseline-only and --s2sd-only leave nothing to train: give one of them")
    if not distils_features and args.feature_weight is not None:
        main.error(f"--feature-weight is for msdf and msdfa, not for --variant {args.variant}")
    if args.variant == "dsd" and len(args.dims or DIMS[-1:]) > 1:
        main.error("--variant dsd has one head: give one of --dims, or use --variant msd")
    args.dims = args.dims or (DIMS[-1:] if args.variant == "dsd" else DIMS)
    if args.feature_weight is None:
        args.feature_weight = FEATURE_WEIGHT if distils_features else 0.0
    args.loss_args, args.miner_args = dict(args.loss_args), dict(args.miner_args)
    args.head_lr = args.lr if args.head_lr is None else args.head_lr
    args.loss_lr = args.lr if args.loss_lr is None else args.loss_lr
    return args
