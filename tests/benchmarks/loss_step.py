"""The loss step, forward and backward from features on: S2SDLoss against the plain equations.

Beside it the floor, which no implementation of the objective can go below as long as PML computes
the branch losses: the heads' matrix products, and PML's loss and miner in every space.
"""

from __future__ import annotations

import torch
from harness import backward, finish, in_turn, milliseconds, parser, ratio, start
from plain import PAPER_HEAD_DIMS, PlainS2SD
from pytorch_metric_learning import losses, miners

from s2sd_pml import S2SDLoss

LOSSES = {
    "multi-similarity": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "contrastive": lambda: (losses.ContrastiveLoss(), None),
    "multi-similarity-unmined": lambda: (losses.MultiSimilarityLoss(), None),
}


def measure(name: str, batch: int, args) -> dict[str, object]:
    """Times of a batch, with two samples per class as in the paper."""
    features = torch.randn(batch, args.features, device=args.device, requires_grad=True)
    labels = torch.arange(batch, device=args.device) // 2
    embedder = torch.nn.Linear(args.features, args.embedding_size).to(args.device)
    loss, miner = LOSSES[name]()
    ours = S2SDLoss(
        loss, miner, feature_dim=args.features, head_dims=args.dims, feature_distill_delay=0
    ).to(args.device)
    heads = [branch.head for branch in ours.branches.values()]
    plain = PlainS2SD(loss, miner, heads, γ=50.0, γ_f=50.0)
    leaves = [features, *embedder.parameters(), *ours.parameters()]
    sizes = (args.embedding_size, *args.dims)
    spaces = [torch.randn(batch, d, device=args.device, requires_grad=True) for d in sizes]

    def head_products() -> None:
        outputs = [head(features) for head in heads]
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(outputs, [torch.ones_like(z) for z in outputs])

    def branch_losses() -> None:
        for z in spaces:
            mined = miner(z, labels) if miner is not None else None
            backward(loss(z, labels, mined), z)

    pieces = {
        "ours": lambda: backward(ours(embedder(features), labels, features=features), *leaves),
        "plain": lambda: backward(plain(embedder(features), labels, features), *leaves),
        "heads": head_products,
        "losses": branch_losses,
    }
    seconds = in_turn(pieces, args.repeats, args.device)
    seconds["floor"] = [a + b for a, b in zip(seconds["heads"], seconds["losses"], strict=True)]
    to_plain, to_floor = ratio(seconds, "ours", "plain"), ratio(seconds, "ours", "floor")
    return {
        "loss": name,
        "batch": batch,
        "S2SDLoss ms": milliseconds(seconds["ours"]),
        "plain ms": milliseconds(seconds["plain"]),
        "heads ms": milliseconds(seconds["heads"]),
        "branch losses ms": milliseconds(seconds["losses"]),
        "S2SDLoss / plain": to_plain["ratio"],
        "quartiles": f"{to_plain['low']:.2f} to {to_plain['high']:.2f}",
        "S2SDLoss / (heads + branch losses)": to_floor["ratio"],
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batches", type=int, nargs="+", default=[112, 512, 2048])
    flags.add_argument("--losses", nargs="+", choices=list(LOSSES), default=["multi-similarity"])
    flags.add_argument("--dims", type=int, nargs="+", default=list(PAPER_HEAD_DIMS))
    flags.add_argument("--features", type=int, default=2048)
    flags.add_argument("--embedding-size", type=int, default=128)
    args = flags.parse_args()
    start(args)
    finish(args, [measure(name, batch, args) for name in args.losses for batch in args.batches])


if __name__ == "__main__":
    main()
