"""Processes of this machine as the ranks of a world, for a function; none is left when it returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def run_on_ranks(function: Callable[..., Any], *args: Any, world_size: int, threads: int = 1) -> list[Any]:
    """Results by rank of `function(*args)`, in `world_size` new processes, each on its own device.

    Args:
        function: importable by name.
        args: picklable, as the results must be.
        world_size: number of processes.
        threads: of each process on the CPU.

    Raises:
        RuntimeError: a rank failed; with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            here, there = context.Pipe()
            place = (rank, world_size, str(Path(folder) / "rendezvous"))
            process = context.Process(target=_work, args=(place, there), name=f"simulated {rank}")
            with _environment(OMP_NUM_THREADS=str(threads), LOCAL_RANK=str(rank)):
                process.start()
            there.close()
            here.send((function, args))
            ranks.append((process, here))
        try:
            return _answers([pipe for _, pipe in ranks])
        finally:
            for process, _ in ranks:
                process.join(timeout=1)
                if process.is_alive():
                    process.kill()
                    process.join()


class _environment:  # noqa: N801  # a context, used like a function
    """Environment variables for the length of a block; a new process inherits them."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.kept = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_exception: object) -> None:
        for name, value in self.kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _answers(pipes: list[Connection]) -> list[Any]:
    """What the ranks return; the first that fails ends the wait for the others, who may wait for it."""
    from multiprocessing.connection import wait

    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        for pipe in wait(list(waiting)):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                succeeded, result = pipe.recv()
            except EOFError:
                succeeded, result = False, "the process ended without a word (killed, for memory perhaps)"
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _work(place: tuple[int, int, str], pipe: Connection) -> None:
    import torch.distributed as dist

    from sas_megatron.platform.device import prepare_device, process_group_backend

    rank, world_size, rendezvous = place
    try:
        # Before the function is received, whose module may import Megatron-core: that must find the CPU's
        # stand-in.
        device = prepare_device()
        function, args = pipe.recv()
        dist.init_process_group(
            process_group_backend(device),
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
        )
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result))
    except Exception:
        pipe.send((False, traceback.format_exc()))
