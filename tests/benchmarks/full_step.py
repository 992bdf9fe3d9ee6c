"""The full training step with a backbone, with S2SD and without: forward, backward, Adam.

MultiSimilarityLoss with its miner, frozen batch norm, random images. The backbone is one of
examples/trainer/backbones.py; lite0, EfficientNet-lite0, has its ImageNet weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from harness import finish, in_turn, milliseconds, parser, ratio, start
from plain import LOSSES, PAPER_HEAD_DIMS, metric_loss

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from trainer import backbones
from trainer.network import Network

from s2sd_pml import S2SDLoss


def measure(size: int, args) -> dict[str, object]:
    """Both steps in turn, on models of their own."""
    images = torch.randn(args.batch, 3, size, size, device=args.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(args.batch, device=args.device) // 2

    def trained(s2sd: bool):
        model = Network(
            args.embedding_size,
            args.backbone,
            channels=3,
            image_size=size,
            pretrained=args.backbone == "lite0",
            freeze_bn=True,
        ).to(args.device)
        loss, miner = LOSSES["MultiSimilarity with miner"]()
        parameters = list(model.parameters())
        if s2sd:
            loss_func = S2SDLoss(
                loss, miner, embedder=model.embedder, head_dims=args.dims, feature_distill_delay=0
            ).to(args.device)
            parameters += loss_func.parameters()
        optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=args.fused)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                embeddings = model(images)
                if s2sd:
                    value = loss_func(embeddings, labels)
                else:
                    value = metric_loss(loss, miner, embeddings.float(), labels)
            value.backward()
            optimizer.step()

        return step

    pieces = {"base": trained(False), "S2SD": trained(True)}
    seconds = in_turn(pieces, args.repeats, args.device)
    compared = ratio(seconds, "S2SD", "base")
    return {
        "backbone": args.backbone,
        "pixels": size,
        "batch": args.batch,
        "heads": " ".join(map(str, args.dims)),
        "base loss ms": milliseconds(seconds["base"]),
        "S2SDLoss ms": milliseconds(seconds["S2SD"]),
        "S2SDLoss / base": compared["ratio"],
        "quartiles": f"{compared['low']:.2f} to {compared['high']:.2f}",
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--backbone", default="lite0", help=f"{', '.join(backbones.MAKERS)} or a name of timm"
    )
    flags.add_argument("--batch", type=int, default=112)
    flags.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="pixels")
    flags.add_argument("--embedding-size", type=int, default=128)
    flags.add_argument("--dims", type=int, nargs="+", default=list(PAPER_HEAD_DIMS))
    flags.add_argument("--fused", action="store_true", help="Adam(fused=True) for both")
    flags.add_argument("--bf16", action="store_true", help="autocast for both")
    args = flags.parse_args()
    start(args)
    finish(args, [measure(size, args) for size in args.sizes])


if __name__ == "__main__":
    main()
