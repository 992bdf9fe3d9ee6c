"""The two objectives that are compared: a base loss, and the same loss inside S2SDLoss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import nn

from s2sd_pml import ProjectionHead, S2SDLoss

from . import ranks
from .by_name import LossAndMiner, pml_loss
from .network import Network
from .reach import PAPERS, OtherReach


def base_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """That loss as it is; for prefixes and over several ranks, in an S2SDLoss without S2SD."""
    loss_func, miner = pml_loss(args, num_classes)
    if ranks.world() == 1 and not args.matryoshka_dims:
        return loss_func, miner
    without = S2SDLoss(
        loss_func,
        miner,
        embedding_size=args.embedding_size,
        head_dims=(),
        feature_distill_weight=0,
        matryoshka_dims=args.matryoshka_dims,
        gather_distributed=ranks.world() > 1,
    )
    return without, None


def s2sd_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """The same loss and miner inside S2SDLoss, which mines for itself."""
    features: dict[str, Any] = {"embedder": model.embedder}
    if args.variant == "msdfa":  # max pooling needs the feature map
        features = {"trunk": model.trunk, "feature_dim": model.embedder.in_features}
    kind: type[S2SDLoss] = S2SDLoss
    if args.reach != PAPERS:
        kind, features["reach"] = OtherReach, args.reach
    loss_func = kind(  # the variant without its checks: controls have weights of 0, or no heads
        *pml_loss(args, num_classes),
        **features,
        pooling="avg+max" if args.variant == "msdfa" else "avg",
        head_dims=args.dims,
        head=nn.Linear if args.linear_heads else ProjectionHead,
        distill_weight=ramp(args, args.distill_weight),
        temperature=args.temperature,
        feature_distill_weight=ramp(args, args.feature_distill_weight),
        feature_distill_delay=args.feature_distill_delay * args.accumulate,  # it counts forwards
        exclude_self=args.exclude_self,
        matryoshka_dims=args.matryoshka_dims,
        teacher_weight=ramp(args, args.teacher_weight) if args.teacher else 0.0,
        gather_distributed=ranks.world() > 1,
    )
    return loss_func, None


def ramp(args: argparse.Namespace, full: float) -> float | Callable[[int], float]:
    """A weight under ``--ramp``: 0, then rising, then full."""
    if not args.ramp or not full:  # 0 switches a term off, a function of steps does not
        return full
    first, last = (step * args.accumulate for step in args.ramp)  # it counts forwards
    return lambda step: full * min(1.0, max(0.0, (step - first) / (last - first)))
