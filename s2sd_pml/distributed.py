"""Bring the batches of all ranks together in rank order, with gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T", Tensor, Tensor | None)


class Gather:
    """Brings the local batches of all ranks together, in rank order and with exact gradients.

    DistributedDataParallel averages gradients over ranks. Every rank computes the branch losses of
    the same global batch, and the KL of its own rows only; the differentiable gather sends each
    row's gradient back to the rank it came from. Then the averages are those of one process that
    holds the whole batch.

    Args:
        embeddings: the local batch; ranks may hold different numbers of rows.
        enabled: False makes everything the identity, as does a world of one rank.
    """

    def __init__(self, embeddings: Tensor, enabled: bool) -> None:
        ready = enabled and dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if ready else 1
        self.device = embeddings.device
        self.own_rows: tuple[int, int] | None = None
        if self.world_size > 1:
            self.sizes = _batch_sizes(embeddings, self.world_size)
            rank = dist.get_rank()
            start = sum(self.sizes[:rank])
            self.own_rows = (start, start + self.sizes[rank])
            # This rank's weight in a mean over ranks: 1 if all hold as many rows.
            self.share = self.sizes[rank] * self.world_size / sum(self.sizes)

    def __call__(self, x: T) -> T:
        """The rows of all ranks."""
        if x is None or self.world_size == 1:
            return x
        return _gather_rows(x.to(self.device), self.sizes)

    def joined(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all ranks of several tensors (B, d_i), in one collective."""
        if self.world_size == 1 or not parts:
            return parts
        rows = self(torch.cat(list(parts.values()), dim=1))
        split = torch.split(rows, [part.shape[1] for part in parts.values()], dim=1)
        return dict(zip(parts, split, strict=True))

    def touch(self, loss: Tensor, modules: Iterable[nn.Module]) -> Tensor:
        """The loss, made to depend on every parameter, with gradient 0.

        DistributedDataParallel waits for all gradients, and a batch without pairs gives a learnable
        margin none.
        """
        if self.world_size == 1:
            return loss
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        return loss + sum(p.sum() * 0 for p in parameters)

    def mean(self, total: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        """Turn means over this rank's rows into means over all; the gradient stays this rank's."""
        if self.world_size == 1:
            return total, each
        total = total * self.share
        value = torch.cat([total.detach().reshape(1), each * self.share])
        dist.all_reduce(value)
        value /= self.world_size
        return total + (value[0] - total.detach()), value[1:]


def _batch_sizes(batch: Tensor, world_size: int) -> list[int]:
    own = torch.tensor([len(batch)], device=batch.device)
    every = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(every, own)
    return [int(n) for n in every]


def _gather_rows(x: Tensor, sizes: list[int]) -> Tensor:
    largest = max(sizes)
    if len(x) < largest:  # collectives want equal shapes
        x = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])])
    every: Tensor = _AllGather.apply(x, len(sizes))  # type: ignore[no-untyped-call]
    return torch.cat([part[:n] for part, n in zip(every, sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    """(B, ...) -> (world size, B, ...). Backward adds up what all ranks want of this one's rows.

    torch.distributed.nn has the same, deprecated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> Tensor:
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(every, x)
        return torch.stack(every)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()], None
