"""Bring the batches of all ranks together in rank order, with gradients."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import DistributedError, S2SDWarning, outside
from .uncompiled import uncompiled

T = TypeVar("T", Tensor, Tensor | None)
MUST_AGREE = (
    "the embedding size",
    "the type of the embeddings",
    "the type of the labels (None: none given)",
    "the training step",
    "the names or widths of the outside teachers",
)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TYPES = [None, *sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)]


class Gather:
    """Brings the local batches of all ranks together, in rank order and with exact gradients.

    DistributedDataParallel averages gradients over ranks. Every rank computes the branch losses of
    the same global batch, and the KL of its own rows only; the differentiable gather sends each
    row's gradient back to the rank it came from. Then the averages are those of one process that
    holds the whole batch.

    Args:
        enabled: False makes everything the identity, as does a world of one rank.
    """

    def __init__(self, enabled: bool) -> None:
        ready = enabled and dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if ready else 1
        self.own_rows: tuple[int, int] | None = None
        self._print = 0  # of the parameters, where they are compared
        self._teachers = 0  # a checksum of the next
        self._shapes: dict[str, int] = {}  # names and widths

    @contextmanager
    def agreement(self, embeddings: Any, labels: Any, loss: Any) -> Iterator[None]:
        """Check this rank's batch within; at the end all ranks go on, or none.

        A rank that refuses its batch would leave the others waiting for it. So the ranks exchange
        whether they accept it, how many rows they hold (which may differ), and what must be equal.

        Raises:
            DistributedError: on the ranks that found nothing wrong themselves.
        """
        if self.world_size == 1:
            yield
            return
        self.device = getattr(embeddings, "device", torch.device("cpu"))
        message = torch.zeros(len(MUST_AGREE) + 3, dtype=torch.long, device=self.device)
        try:
            yield
        except Exception:
            _all_gather(message, self.world_size)
            raise
        types = [TYPES.index(x if x is None else x.dtype) for x in (embeddings, labels)]
        own = [1, *embeddings.shape, *types, loss.step, self._teachers, self._print]
        reports = [r.tolist() for r in _all_gather(message.new_tensor(own), self.world_size)]
        if failed := [str(rank) for rank, (fine, *_) in enumerate(reports) if not fine]:
            raise DistributedError(
                f"This rank's batch is fine, but rank {', '.join(failed)} of {self.world_size} "
                "refused its own. See the error raised there."
            )
        for name, values in zip(
            MUST_AGREE, zip(*(t[2:-1] for t in reports), strict=True), strict=True
        ):
            if len(set(values)) > 1:
                if "teachers" in name:
                    raise DistributedError(
                        f"The ranks differ in {name}. This one has {self._shapes}, by name and "
                        "width. Pass the same teachers on every rank."
                    )
                seen = [TYPES[v] for v in values] if "type" in name else list(values)
                raise DistributedError(
                    f"The ranks differ in {name}: {seen}, in rank order. Call the loss "
                    "with the same model and at the same step on all of them."
                )
        if len({t[-1] for t in reports}) > 1:
            warnings.warn(
                f"The parameters of heads and losses differ between the {self.world_size} ranks, "
                "so the heads' embeddings of the global batch are not of one space. Wrap "
                "the loss as the model is, DistributedDataParallel(loss_func).",
                S2SDWarning,
                stacklevel=outside(),
            )
        self.sizes = [rows for _, rows, *_ in reports]
        rank = dist.get_rank()
        start = sum(self.sizes[:rank])
        self.own_rows = (start, start + self.sizes[rank])
        # This rank's weight in a mean over ranks: 1 if all hold as many rows.
        self.share = self.sizes[rank] * self.world_size / sum(self.sizes)

    def check_gatherable(self, indices_tuple: Any, ref_emb: Any) -> None:
        """Nothing was given that cannot be gathered over ranks."""
        seen = "is of this rank's batch, but gather_distributed=True works on the global batch"
        if self.world_size > 1 and indices_tuple is not None:
            raise DistributedError(f"indices_tuple {seen}. Pass the miner to S2SDLoss instead.")
        if self.world_size > 1 and ref_emb is not None:
            raise DistributedError(
                f"ref_emb {seen}. Leave it out, or use gather_distributed=False."
            )

    def compare(self, loss: Any, teachers: dict[str, Tensor]) -> None:
        """Within ``agreement``: let the ranks compare teachers and, at some steps, parameters.

        Heads that are built alike and trained apart differ from the first step of the optimizer on.
        """
        if self.world_size == 1:
            return
        if teachers:
            self._shapes = {name: x.shape[1] for name, x in teachers.items()}
            self._teachers = zlib.crc32(repr(self._shapes).encode())
        step = loss.step
        if (step & (step - 1) == 0 or step % 256 == 0) and not any(
            "FullySharded" in type(m).__name__ for m in loss.modules()
        ):
            self._print = fingerprint(loss.parameters())

    def __call__(self, x: T) -> T:
        """The rows of all ranks."""
        if x is None or self.world_size == 1:
            return x
        return _gather_rows(x.to(self.device), self.sizes)

    def joined(self, parts: list[Tensor]) -> list[Tensor]:
        """The rows of all ranks of several tensors (B, d_i), in one collective."""
        if self.world_size == 1 or not parts:
            return parts
        rows = self(torch.cat(parts, dim=1))
        return list(torch.split(rows, [part.shape[1] for part in parts], dim=1))

    def touch(self, loss: Tensor, modules: Iterable[nn.Module]) -> Tensor:
        """The loss, made to depend on every parameter, with gradient 0.

        DistributedDataParallel waits for all gradients, and a batch without pairs gives a learnable
        margin none.
        """
        if self.world_size == 1:
            return loss
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        return loss + sum(p.sum() * 0 for p in parameters)

    def mean(self, x: Tensor) -> Tensor:
        """Turn means over this rank's rows into means over all; the gradient stays this rank's."""
        if self.world_size == 1:
            return x
        x = x * self.share
        value = x.detach().clone()
        dist.all_reduce(value)
        return x + (value / self.world_size - x.detach())


def fingerprint(parameters: Iterable[Tensor]) -> int:
    """A number that differs, but for chance, where a single bit does.

    The bits are added up as whole numbers, which no order of summation rounds.
    """
    total = torch.zeros((), dtype=torch.long)
    for p in parameters:
        if type(p) in (Tensor, nn.Parameter):  # DTensors differ by right
            p = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
            bits = p.contiguous().view(BITS[p.element_size()])
            total = total.to(p.device) * 31 + bits.sum()
    return int(total)


def _all_gather(x: Tensor, world_size: int) -> list[Tensor]:
    every = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(every, x)
    return every


class _AllGather(torch.autograd.Function):
    """all_gather; its gradient brings together what every rank has for each one's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> tuple[Tensor, ...]:
        return tuple(_all_gather(x, world_size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        every = torch.cat(grads)
        if dist.get_backend() == "nccl":
            own = torch.empty_like(grads[0])
            dist.reduce_scatter_tensor(own, every)
            return own, None
        dist.all_reduce(every)  # gloo of older torch scatters no sums
        return every.chunk(len(grads))[dist.get_rank()], None


@uncompiled
def _gather_rows(x: Tensor, sizes: list[int]) -> Tensor:
    largest = max(sizes)
    if len(x) < largest:  # collectives want equal shapes
        x = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])])
    every = _AllGather.apply(x.contiguous(), len(sizes))  # type: ignore[no-untyped-call]
    return torch.cat([part[:n] for part, n in zip(every, sizes, strict=True)])
