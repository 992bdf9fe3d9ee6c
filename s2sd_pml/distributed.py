"""Bring the batches of all ranks together in rank order, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor

from .errors import DistributedError


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_sizes(batch: Tensor) -> list[int]:
    """The number of rows on every rank, in rank order. Each rank must have at least one."""
    own = torch.tensor([len(batch)], device=batch.device)
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    sizes = [int(n) for n in every]
    if 0 in sizes:
        raise DistributedError(
            f"The ranks hold {sizes} samples: gather_distributed needs at least one on every rank. "
            "Use drop_last=True, or a DistributedSampler, which evens out the ranks."
        )
    return sizes


def gather_rows(x: Tensor, sizes: list[int]) -> Tensor:
    """Rows of all ranks in rank order. The gradient of each row flows back to the rank it is from.

    Args:
        x: (sizes[rank], ...) of the same width and dtype on every rank.
        sizes: what :func:`batch_sizes` returned; they may differ.
    """
    largest = max(sizes)
    if len(x) < largest:  # collectives want equal shapes
        x = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])])
    if x.requires_grad:
        every = dist_nn.all_gather(x.contiguous())  # type: ignore[no-untyped-call]
    else:
        every = [torch.empty_like(x) for _ in sizes]
        dist.all_gather(every, x.contiguous())
    return torch.cat([part[:n] for part, n in zip(every, sizes, strict=True)])


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a detached tensor over the ranks."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather_batch(
    embeddings: Tensor,
    projected: dict[str, Tensor],
    features: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None, tuple[int, int], float]:
    """The global batch in rank order, this rank's rows in it, and its share in a mean over rows.

    Embeddings and head outputs travel together, in one collective in each direction.
    """
    sizes = batch_sizes(embeddings)
    rank = dist.get_rank()
    parts = [embeddings, *projected.values()]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    joined = gather_rows(torch.cat([part.to(dtype) for part in parts], dim=1), sizes)
    embeddings, *heads = torch.split(joined, [part.shape[1] for part in parts], dim=1)
    projected = dict(zip(projected, heads, strict=True))
    if features is not None:
        features = gather_rows(features.detach(), sizes)
    if labels is not None:
        labels = gather_rows(labels.to(embeddings.device), sizes)
    start = sum(sizes[:rank])
    share = sizes[rank] * len(sizes) / sum(sizes)
    return embeddings, projected, features, labels, (start, start + sizes[rank]), share


def share_of_rank(total: Tensor, each: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Turn means over this rank's rows into means over all, keeping this rank's gradient.

    DistributedDataParallel averages gradients over ranks, so each rank contributes the gradient of
    its own rows' mean (times its share of the batch, 1 if ranks are even).
    """
    total = total * share
    value = mean_over_ranks(torch.cat([total.reshape(1), each * share]))
    return total + (value[0] - total.detach()), value[1:]
