"""Operations of a loss step, forward and backward: S2SDLoss over the base loss alone.

And S2SDLoss with Matryoshka prefixes over S2SDLoss without.

On the CPU every operation that does work itself stands for a kernel; views and allocations do
not. With --device cuda the profiler counts the kernels. Reads are the places where a GPU would
have to finish before Python goes on. PyTorch 2.1 times operations in whole microseconds, which
nests some wrongly: it counts a few too many.
"""

from __future__ import annotations

import warnings

import torch
from harness import backward, finish, parser, start
from plain import LOSSES, PAPER_HEAD_DIMS, metric_loss
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from s2sd_pml import S2SDLoss

NO_WORK = set(
    "alias as_strided chunk contiguous detach detach_ diagonal empty empty_like empty_strided "
    "expand expand_as is_nonzero item lift_fresh narrow new_empty new_empty_strided numpy_T "
    "permute reshape resize_ resolve_conj resolve_neg result_type select set_ slice split "
    "squeeze t to transpose unbind unflatten unsqueeze view view_as _local_scalar_dense "
    "_reshape_alias _unsafe_view".split()
)
READS = set(
    "_local_scalar_dense equal is_nonzero masked_select nonzero unique_consecutive unique_dim "
    "_unique _unique2".split()
)
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}


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


class Reads(TorchDispatchMode):
    """Counts operations whose result, or its size, Python has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in BY_MASK and any(i is not None and i.dtype == torch.bool for i in args[1])
        by_mask = by_mask and (name == "index" or args[2].numel() > 1)  # one value only fills
        self.count += name in READS or by_mask
        return func(*args, **(kwargs or {}))


def reads(work, device: str) -> int:
    """How often a piece of work waits for the device."""
    if not device.startswith("cuda"):
        with Reads() as counter:
            work()
        return counter.count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(name: str, args) -> dict[str, object]:
    """Counts for one loss, with two samples per class."""
    features = torch.randn(args.batch, args.features, device=args.device, requires_grad=True)
    labels = torch.arange(args.batch, device=args.device) // 2
    embedder = torch.nn.Linear(args.features, args.embedding_size).to(args.device)
    loss, miner = LOSSES[name]()
    kwargs = {"feature_dim": args.features, "head_dims": args.dims, "feature_distill_delay": 0}
    ours = S2SDLoss(loss, miner, **kwargs).to(args.device)
    nested = S2SDLoss(loss, miner, matryoshka_dims=args.prefixes, **kwargs).to(args.device)

    def base_step() -> None:
        backward(metric_loss(loss, miner, embedder(features), labels))

    def our_step() -> None:
        backward(ours(embedder(features), labels, features=features))

    def nested_step() -> None:
        backward(nested(embedder(features), labels, features=features))

    steps = (base_step, our_step, nested_step)
    base, s2sd, prefixes = (launches(step, args.device) for step in steps)
    return {
        "loss": name,
        "base loss": base,
        "S2SDLoss": s2sd,
        "ratio": s2sd / base,
        "reads of the base loss": reads(base_step, args.device),
        "reads of S2SDLoss": reads(our_step, args.device),
        "with prefixes": prefixes,
        "with / without prefixes": prefixes / s2sd,
        "reads with prefixes": reads(nested_step, args.device),
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    flags.add_argument("--batch", type=int, default=112)
    flags.add_argument("--dims", type=int, nargs="+", default=list(PAPER_HEAD_DIMS))
    flags.add_argument("--features", type=int, default=2048)
    flags.add_argument("--embedding-size", type=int, default=128)
    flags.add_argument("--prefixes", type=int, nargs="*", default=[16, 32, 64])
    args = flags.parse_args()
    start(args)
    finish(args, [measure(name, args) for name in args.losses])


if __name__ == "__main__":
    main()
