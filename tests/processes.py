"""Functions on gloo ranks, in processes that serve test after test: starting them is slow."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from s2sd_pml.errors import S2SDWarning

_pool: list[tuple[Any, Any]] = []  # processes, each with the pipe to it


def on_ranks(function: Callable[[int], dict[str, torch.Tensor]], world: int) -> list[Any]:
    """Run ``function(rank)`` on gloo ranks; return what each returned, or raise what one raised."""
    while len(_pool) < world:
        _pool.append(_start())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes = [pipe for _, pipe in _pool[:world]]
    try:
        for rank, pipe in enumerate(pipes):
            pipe.send((function, rank, world, port))
        results = [pipe.recv() for pipe in pipes]
        if not all(pipe.poll(60) and pipe.recv() for pipe in pipes):
            # as PyTorch's teardown may, pytest need not
            warnings.warn("a rank that was done did not end within a minute", stacklevel=2)
            _stop()
    except BaseException:
        _stop()
        raise
    if any(isinstance(r, str) for r in results):
        _stop()
        raise AssertionError("\n".join(map(str, results)))
    return results


def _start() -> tuple[Any, Any]:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # that the end of the process is the end of the pipe
    return process, ours


@atexit.register
def _stop() -> None:
    """End all; the next call starts others."""
    for process, _ in _pool:
        process.terminate()
    for process, pipe in _pool:
        process.join(10)
        process.kill()
        pipe.close()
    _pool.clear()


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("error", S2SDWarning)  # where the loss is wrapped there is none
            _on_rank(pipe, *job)
        pipe.send(True)


def _on_rank(pipe: Any, function: Any, rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
        )
        # numpy, since tensors would share memory with another process
        pipe.send({k: v.numpy().copy() for k, v in function(rank).items()})
    except BaseException:  # pytest's own failures are none of Exception
        pipe.send(traceback.format_exc())
    finally:
        gc.collect()  # DDP goes before its process group, see ranks.stop of the examples
        if dist.is_initialized():
            dist.destroy_process_group()
