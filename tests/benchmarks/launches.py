"""Kernels per loss step, forward and backward: what a GPU would launch.

On the CPU every operation that does work itself stands for a launch; views and allocations do
not. With --device cuda the profiler counts the kernels themselves. PyTorch 2.1 times operations in
whole microseconds, which nests some wrongly: it counts a few too many.
"""

from __future__ import annotations

import torch
from harness import backward, finish, parser, start
from plain import PAPER_HEAD_DIMS, PlainS2SD
from pytorch_metric_learning import losses, miners
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from s2sd_pml import S2SDLoss
from s2sd_pml.functional import relation_kl, relation_kl_reference

NO_WORK = set(
    "alias as_strided chunk contiguous detach detach_ diagonal empty empty_like empty_strided "
    "expand expand_as is_nonzero item lift_fresh narrow new_empty new_empty_strided numpy_T "
    "permute reshape resize_ resolve_conj resolve_neg result_type select set_ slice split "
    "squeeze t to transpose unbind unflatten unsqueeze view view_as _local_scalar_dense "
    "_reshape_alias _unsafe_view".split()
)


def launches(work, device: str) -> int:
    """The number of kernels of a piece of work."""
    work()
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        work()
    events = recorded.events()
    if device.startswith("cuda"):
        return sum(e.device_type == DeviceType.CUDA for e in events)
    return sum(working(event) for event in events if event.cpu_parent is None)


def working(event) -> int:
    """Operations within an event that do work themselves, or 1 if it is one and has none below."""
    below = sum(working(child) for child in event.cpu_children)
    name = event.name.removeprefix("aten::")
    return below or int(name != event.name and name not in NO_WORK)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=112)
    flags.add_argument("--features", type=int, default=2048)
    flags.add_argument("--embedding-size", type=int, default=128)
    args = flags.parse_args()
    start(args)
    features = torch.randn(args.batch, args.features, device=args.device, requires_grad=True)
    labels = torch.arange(args.batch, device=args.device) // 2
    embedder = torch.nn.Linear(args.features, args.embedding_size).to(args.device)
    loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    ours = S2SDLoss(loss, miner, feature_dim=args.features, feature_distill_delay=0).to(args.device)
    heads = [branch.head for branch in ours.branches.values()]
    plain = PlainS2SD(loss, miner, heads, γ=50.0, γ_f=50.0)
    widths = [*PAPER_HEAD_DIMS, args.features]
    teachers = [torch.randn(args.batch, width, device=args.device) for width in widths]
    weights = [50.0] * len(teachers)

    def base() -> None:
        embeddings = embedder(features)
        backward(loss(embeddings, labels, miner(embeddings, labels)))

    def head_products() -> None:
        outputs = [head(features) for head in heads]
        torch.autograd.backward(outputs, [z.detach() for z in outputs])

    def distil(function) -> None:
        embeddings = embedder(features)
        backward(function(embeddings, teachers, weights=weights)[0])

    pieces = {
        "loss step": (
            lambda: backward(ours(embedder(features), labels, features=features)),
            lambda: backward(plain(embedder(features), labels, features)),
        ),
        "distillation": (lambda: distil(relation_kl), lambda: distil(relation_kl_reference)),
        "base loss alone": (base, base),
        "heads alone": (head_products, head_products),
    }
    rows = []
    for name, pair in pieces.items():
        here, there = (launches(work, args.device) for work in pair)
        rows.append({"work": name, "s2sd-pml": here, "plain": there, "ratio": here / there})
    finish(args, rows)


if __name__ == "__main__":
    main()
