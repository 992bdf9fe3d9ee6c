"""Matryoshka students: prefixes of the embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .errors import ArgumentError
from .validation import check_dims


class Prefix(nn.Module):
    """ψ_:k, the first k dimensions of the embeddings: (B, D) -> (B, k)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, : self.size]

    def extra_repr(self) -> str:
        return str(self.size)


def check_matryoshka_dims(dims: Sequence[int], size: int | None) -> tuple[int, ...]:
    """Sizes of prefixes, each once and below the embedding size, where that is known."""
    dims = check_dims("matryoshka_dims", dims, "Give each once")
    if size is not None and (odd := [d for d in dims if d >= size]):
        why = "is included already" if odd == [size] else f"has no prefix of size {max(odd)}"
        raise ArgumentError(
            f"matryoshka_dims={dims}, but the whole embedding, of size {size}, {why}. Build "
            f"S2SDLoss(..., matryoshka_dims={tuple(d for d in dims if d < size)})."
        )
    return dims
