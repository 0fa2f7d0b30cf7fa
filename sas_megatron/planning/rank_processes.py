"""Run a function on several ranks in processes of this machine, and end all of them before returning."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


def run_on_ranks(function: Callable[..., Any], *args: Any, world_size: int, threads: int = 1) -> list[Any]:
    """Run `function(*args)` in `world_size` new processes, each on a separate device.

    Args:
        function: A function that can be imported by name.
        args: Its arguments, picklable like its result.
        world_size: Number of processes.
        threads: CPU threads of each process.

    Returns:
        The results by rank.

    Raises:
        RuntimeError: A rank failed; the message contains its traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            parent_pipe, child_pipe = context.Pipe()
            rendezvous = (rank, world_size, str(Path(folder) / "rendezvous"))
            process = context.Process(
                target=_work, args=(rendezvous, child_pipe), name=f"measured rank {rank}"
            )
            with _environment(OMP_NUM_THREADS=str(threads), LOCAL_RANK=str(rank)):
                process.start()
            child_pipe.close()
            parent_pipe.send((function, args))
            ranks.append((process, parent_pipe))
        try:
            return _receive_results([pipe for _, pipe in ranks])
        finally:
            for process, _ in ranks:
                process.join(timeout=1)
                if process.is_alive():
                    process.kill()
                    process.join()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a `with` block; a new process inherits them."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _receive_results(pipes: list[Connection]) -> list[Any]:
    """Return the results of all ranks.

    Raises:
        RuntimeError: A rank failed. The other ranks, which may be waiting for it, are not waited for.
    """
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        for pipe in wait(list(waiting)):
            assert isinstance(pipe, Connection), f"expected a pipe of a rank, got {pipe!r}"
            rank = waiting.pop(pipe)
            try:
                succeeded, result = pipe.recv()
            except EOFError:
                succeeded, result = (
                    False,
                    "the process ended without a result (killed, possibly out of memory)",
                )
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _work(rendezvous: tuple[int, int, str], pipe: Connection) -> None:
    import torch.distributed as dist

    from sas_megatron.platform.device import prepare_device, process_group_backend

    rank, world_size, path = rendezvous
    try:
        # This must run before the function is received: its module may import Megatron-core, which must find
        # the CPU replacement for CUDA calls.
        device = prepare_device()
        function, args = pipe.recv()
        dist.init_process_group(
            process_group_backend(device),
            init_method=f"file://{path}",
            rank=rank,
            world_size=world_size,
        )
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result))
    except Exception:
        pipe.send((False, traceback.format_exc()))
