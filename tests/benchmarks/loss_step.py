"""The loss step, forward and backward from features on: S2SDLoss, the base loss, plain equations.

The step has the embedder, the heads, all metric losses and the distillation, but no backbone and
no optimizer. The base loss is the embedder and PML's loss with its miner: training without S2SD.
"Plain" is the paper's equations written with PML's own parts. On a GPU, S2SDLoss is also compiled
in one piece, and replayed as a CUDA graph; base loss and plain equations run eagerly.
"""

from __future__ import annotations

import copy

import torch
from harness import (
    backward,
    captured,
    finish,
    in_turn,
    milliseconds,
    parser,
    peak_memory,
    ratio,
    start,
)
from plain import LOSSES, PAPER_HEAD_DIMS, PlainS2SD, metric_loss

from s2sd_pml import S2SDLoss

MODES = ("eager", "compiled", "graph")


def measure(name: str, batch: int, modes: list[str], args) -> list[dict[str, object]]:
    """Times and memory of a batch, with two samples per class as in the paper; a row a mode."""
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
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True)  # eager steps recompile it

    def step(loss_func) -> None:
        own = [features, *embedder.parameters(), *loss_func.parameters()]
        backward(loss_func(embedder(features), labels, features=features), *own)

    pieces = {
        "base": lambda: backward(metric_loss(loss, miner, embedder(features), labels), *leaves),
        "plain": lambda: backward(plain(embedder(features), labels, features), *leaves),
        "eager": lambda: step(ours),
    }
    if "compiled" in modes:
        pieces["compiled"] = lambda: step(compiled)
        for _ in range(3):  # the first ones compile
            pieces["compiled"]()
    if "graph" in modes:
        pieces["graph"] = captured(pieces["eager"])
    seconds = in_turn(pieces, args.repeats, args.device)
    memory = {}
    for piece in ("base", "plain", "eager"):
        for leaf in leaves:
            leaf.grad = None
        memory[piece] = peak_memory(pieces[piece], args.device) / 2**20
    rows = []
    for mode in modes:
        to_base, to_plain = ratio(seconds, mode, "base"), ratio(seconds, mode, "plain")
        rows.append(
            {
                "loss": name,
                "batch": batch,
                "mode": mode,
                "base loss ms": milliseconds(seconds["base"]),
                "S2SDLoss ms": milliseconds(seconds[mode]),
                "plain ms": milliseconds(seconds["plain"]),
                "S2SDLoss / base": to_base["ratio"],
                "its quartiles": f"{to_base['low']:.2f} to {to_base['high']:.2f}",
                "S2SDLoss / plain": to_plain["ratio"],
                "quartiles of that": f"{to_plain['low']:.2f} to {to_plain['high']:.2f}",
                "base loss MiB": memory["base"],
                "S2SDLoss MiB": memory["eager"],
                "plain MiB": memory["plain"],
            }
        )
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batches", type=int, nargs="+", default=[112, 512, 2048])
    flags.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES)[:1])
    flags.add_argument("--modes", nargs="+", choices=MODES, help="default: all on a GPU, or eager")
    flags.add_argument("--dims", type=int, nargs="+", default=list(PAPER_HEAD_DIMS))
    flags.add_argument("--features", type=int, default=2048)
    flags.add_argument("--embedding-size", type=int, default=128)
    args = flags.parse_args()
    start(args)
    modes = args.modes or list(MODES if args.device.startswith("cuda") else MODES[:1])
    every = [(name, batch) for name in args.losses for batch in args.batches]
    finish(args, [row for case in every for row in measure(*case, modes, args)])


if __name__ == "__main__":
    main()
