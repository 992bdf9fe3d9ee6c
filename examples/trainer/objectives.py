"""The two objectives that are compared: a base loss, and the same loss inside S2SDLoss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import nn

from s2sd_pml import ProjectionHead, S2SDLoss

from . import export, ranks
from .baselines import MatryoshkaLoss
from .by_name import LossAndMiner, pml_loss
from .network import Network
from .reach import PAPERS, OtherReach


def base_loss(args: argparse.Namespace, model: Network, num_classes: int) -> LossAndMiner:
    """That loss as it is. Over several ranks S2SDLoss without S2SD brings the batch together."""
    loss_func, miner = pml_loss(args, num_classes)
    if args.matryoshka_dims:
        return MatryoshkaLoss(loss_func, miner, args.embedding_size, args.matryoshka_dims), None
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
