"""A refitted embedder: a linear layer trained on the features of a frozen trunk.

The embedder that is trained jointly with its trunk follows features that change. On features that
are computed once, some hundred steps cost little, and one trunk gives any embedding size.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2sd_pml.functional import relation_kl

from .baselines import principal
from .by_name import pml_loss
from .images import Batches

LR = 2e-3


class Frozen(NamedTuple):
    """A part of the data in spaces that no longer move."""

    features: Tensor
    teacher: Tensor | None  # None: the base loss was trained alone
    labels: Tensor
    principal: tuple[Tensor, Tensor]  # mean and directions of the features


def freeze(spaces: dict[str, Tensor], labels: Tensor) -> Frozen:
    """What is fitted to, from the spaces of a run."""
    features = spaces["features"]
    return Frozen(features, heads_of(spaces), labels, principal(features))


def heads_of(spaces: dict[str, Tensor]) -> Tensor | None:
    """The heads' outputs side by side: the cosine of these rows is the mean of the heads'."""
    heads = [z for name, z in spaces.items() if name.startswith("head ")]
    return torch.cat(heads, dim=1) if heads else None


def fit(
    args: argparse.Namespace,
    frozen: Frozen,
    size: int,
    *,
    steps: int,
    base: bool = True,
    distill_weight: float = 0.0,
) -> nn.Linear:
    """An embedder of frozen features, from their principal directions on.

    Args:
        base: whether the base loss is in force.
        distill_weight: γ, the weight of the KL to the heads.
    """
    features, teacher, labels, (mean, directions) = frozen
    torch.manual_seed(args.seed)
    embedder = nn.Linear(features.shape[1], size, device=features.device)
    kept = directions[:, :size].T
    with torch.no_grad():
        embedder.weight[: len(kept)] = kept  # the rest, if any, stays random
        embedder.bias.copy_(-embedder.weight @ mean)
    args = argparse.Namespace(**{**vars(args), "embedding_size": size})
    loss_func, miner = pml_loss(args, int(labels.max()) + 1)
    loss_func.to(features.device)
    groups = [
        {"params": list(embedder.parameters()), "lr": LR},
        {"params": list(loss_func.parameters()), "lr": args.loss_lr},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for rows, _ in Batches(labels, args.batch_size, args.per_class, steps, args.seed).whole():
        embeddings, y = embedder(features[rows]), labels[rows].to(features.device)
        loss = embeddings.new_zeros(())
        if base:
            loss = loss + loss_func(embeddings, y, miner(embeddings, y) if miner else None)
        if distill_weight:
            settings = {"temperature": args.temperature, "exclude_self": args.exclude_self}
            kl = relation_kl(embeddings, [teacher[rows]], **settings)[0]
            loss = loss + distill_weight * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return embedder
