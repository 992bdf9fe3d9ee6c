"""Strong scaling of the distillation over gloo ranks: each rank's work at a fixed global batch.

Every rank takes its own rows against all columns. Counted are floating point operations of matrix
products, bytes of similarity matrices, and processor time of one thread: with more ranks than
cores, wall time would tell nothing.
"""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import backward, finish, parser, peak_memory, start
from plain import PAPER_HEAD_DIMS
from torch.utils.flop_counter import FlopCounterMode

from s2sd_pml.distributed import Gather
from s2sd_pml.functional import relation_kl


def work(rank: int, world: int, port: int, args, queue) -> None:
    """One rank's share, gathered as S2SDLoss does."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(rank)
    rows = args.batch // world
    student = torch.randn(rows, args.embedding_size)
    teachers = {str(j): torch.randn(rows, width) for j, width in enumerate(args.teachers)}
    weights = [50.0 / len(teachers)] * len(teachers)
    gather = Gather(True)
    with gather.agreement(student, None, 0):
        pass
    joined = list(gather.joined(teachers).values())
    ψ = gather(student).detach().requires_grad_()

    def distil() -> None:
        total, _ = relation_kl(
            ψ, joined, weights=weights, rows=gather.own_rows, chunk_size=args.chunk_size
        )
        backward(total, ψ)

    seconds = []
    for _ in range(args.repeats):
        begin = time.process_time()
        distil()
        seconds.append(time.process_time() - begin)
    with FlopCounterMode(display=False) as counter:
        distil()
    queue.put((rank, min(seconds), counter.get_total_flops(), peak_memory(distil)))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, args) -> dict[str, object]:
    """The most that any rank of a world does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=work, args=(rank, world, port, args, queue)) for rank in range(world)
    ]
    for p in processes:
        p.start()
    told = [queue.get() for _ in processes]
    for p in processes:
        p.join()
    _, seconds, flops, memory = (max(column) for column in zip(*told, strict=True))
    return {
        "ranks": world,
        "rows per rank": args.batch // world,
        "GFLOP per rank": flops / 1e9,
        "processor time per rank, ms": 1e3 * seconds,
        "memory per rank, MiB": memory / 2**20,
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    flags.add_argument("--batch", type=int, default=2048)
    flags.add_argument("--teachers", type=int, nargs="+", default=[*PAPER_HEAD_DIMS, 2048])
    flags.add_argument("--embedding-size", type=int, default=128)
    flags.add_argument("--chunk-size", type=int, default=256)
    args = flags.parse_args()
    start(args)
    rows = [measure(world, args) for world in args.ranks]
    for row in rows:
        row["times one rank's"] = (
            row["processor time per rank, ms"] / rows[0]["processor time per rank, ms"]
        )
    finish(args, rows)


if __name__ == "__main__":
    main()
