"""Distillation alone, forward and backward: relation_kl against its plain twin, in time and memory.

"Whole" holds the similarity matrices of all teachers, "chunks" the rows of --chunk-size.
"""

from __future__ import annotations

import torch
from harness import backward, finish, in_turn, milliseconds, parser, peak_memory, ratio, start
from plain import PAPER_HEAD_DIMS

from s2sd_pml.functional import relation_kl, relation_kl_reference


def measure(batch: int, args) -> dict[str, object]:
    """Times and peak memory at a batch size."""

    def draw(width: int) -> torch.Tensor:
        return torch.randn(batch, width, device=args.device)

    student, teachers = draw(args.embedding_size).requires_grad_(), [draw(w) for w in args.teachers]

    def distil(function, **kwargs) -> None:
        backward(50.0 * function(student, teachers, **kwargs).mean(), student)

    pieces = {
        "whole": lambda: distil(relation_kl),
        "chunks": lambda: distil(relation_kl, chunk_size=args.chunk_size),
        "plain": lambda: distil(relation_kl_reference),
    }
    row: dict[str, object] = {"batch": batch}
    if not args.memory_only:
        seconds = in_turn(pieces, args.repeats, args.device)
        row |= {f"{name} ms": milliseconds(taken) for name, taken in seconds.items()}
        for name in ("whole", "chunks"):
            row[f"{name} / plain"] = ratio(seconds, name, "plain")["ratio"]
    memory = {}
    for name, work in pieces.items():
        student.grad = None
        memory[name] = peak_memory(work, args.device)
    row |= {f"{name} MiB": used / 2**20 for name, used in memory.items()}
    for name in ("whole", "chunks"):
        row[f"{name} / plain memory"] = memory[name] / memory["plain"]
    return row


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batches", type=int, nargs="+", default=[112, 512, 2048])
    flags.add_argument("--teachers", type=int, nargs="+", default=[*PAPER_HEAD_DIMS, 2048])
    flags.add_argument("--embedding-size", type=int, default=128)
    flags.add_argument("--chunk-size", type=int, default=256)
    flags.add_argument("--memory-only", action="store_true")
    args = flags.parse_args()
    start(args)
    finish(args, [measure(batch, args) for batch in args.batches])


if __name__ == "__main__":
    main()
