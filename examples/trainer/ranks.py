"""One process or several: what torchrun started, and what each rank does of it.

Every rank draws the same global batch and takes a slice of it; rank 0 alone prints and writes.
Without torchrun all of this does nothing.
"""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WAIT = timedelta(hours=2)  # of the others, while rank 0 evaluates and writes


def world() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """This process among them."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def check(device: str, batch_size: int, norm: bool) -> None:
    """Refuse what several ranks cannot do; ``norm``: batch norm needs nothing of PyTorch's."""
    if world() == 1:
        return
    if device == "cpu" and not norm:
        raise ValueError("PyTorch synchronises batch norm on CUDA only: add --freeze-bn")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} with {world()} ranks: must be cpu or cuda")
    if batch_size < world():
        raise ValueError(f"--batch-size {batch_size} is too small for {world()} ranks")
    local, devices = int(os.environ["LOCAL_RANK"]) + 1, torch.cuda.device_count()
    if device == "cuda" and local > devices:
        raise ValueError(
            f"rank {rank()} needs CUDA device {local} of its machine, which has {devices}: start "
            "as many processes as devices, or add --device cpu"
        )


def start(device: str) -> str:
    """Join the other ranks. The device of this one."""
    if world() == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=WAIT)
    return device


def stop() -> None:
    """Leave the other ranks, once nothing holds what ``parallel`` made.

    DistributedDataParallel would destroy its process group while it holds Python's lock, for which
    the group's own thread may be waiting.
    """
    if world() > 1:
        gc.collect()
        dist.destroy_process_group()


def agree(step: int, device: str) -> None:
    """Refuse to go on from different steps, as ranks with folders of their own might."""
    if world() > 1:
        steps = torch.tensor([step, -step], device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        last, first = int(steps[0]), -int(steps[1])
        if first != last:
            raise RuntimeError(
                f"Ranks would go on from different steps, {first} to {last}: they must share the "
                "folder of the checkpoints."
            )


def on_any(flag: bool, device: str) -> bool:
    """True on every rank if it is on one."""
    if world() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def own(batch: Tensor) -> Tensor:
    """This rank's rows of a global batch: a contiguous slice, a row more on the first if uneven."""
    return batch.tensor_split(world())[rank()]


def synchronised(model: nn.Module) -> nn.Module:
    """The model with batch norm over the global batch: on CUDA, by PyTorch's own."""
    if world() > 1 and next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over ranks."""
    if world() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    return DistributedDataParallel(module)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the global batch, as one process would have them.

    PyTorch's SyncBatchNorm does the same, on CUDA only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        x, given = x.float(), x.dtype  # sums of half precision are none
        dims = (0, 2, 3)
        count = _sum(x.new_tensor(x.numel() / x.shape[1]))
        mean = _sum(x.sum(dims)) / count
        centred = x - mean[:, None, None]
        variance = _sum(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(given)


class _Sum(torch.autograd.Function):
    """The sum over ranks, and in backward that of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


def _sum(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)
    return total
