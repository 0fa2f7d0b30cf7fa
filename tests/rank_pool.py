"""Ranks for tests: processes connected by gloo on loopback, started once for each world size."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.connection
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sas_megatron.config.parallel import ParallelConfig
from tests.fork_server import fork_context

if TYPE_CHECKING:
    from sas_megatron.distributed.topology import Topology


# Sets of groups that a rank creates before it is replaced by a new process. Each set leaves about thirty
# threads with their sockets, which no call releases.
MAX_SETS_OF_GROUPS = 16
# How long the other ranks may take to return once one of them has failed.
SECONDS_AFTER_FAILURE = 10.0


class RankPool:
    """`world_size` processes that run the same function, each with its own rank.

    A function given to `run` must be importable (top level of a test module) and its arguments and
    result picklable.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        os.environ["OMP_NUM_THREADS"] = "1"
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function on all ranks and return the results in rank order.

        Raises:
            AssertionError: The function failed on one or more ranks; the message has their tracebacks.
        """
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = self._answers()
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text, _) in sorted(answers.items()) if not ok]
        if failures:
            # Other ranks may still wait for it in a collective.
            self._kill()
        elif max(sets for *_, sets in answers.values()) >= MAX_SETS_OF_GROUPS:
            self.close()
        # Stop these ranks, so that they use no processor while pools of other world sizes run.
        self._signal(signal.SIGSTOP)
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _answers(self) -> dict[int, tuple[bool, Any, int]]:
        """Return for each rank its success, its result or traceback, and the sets of groups it has created.

        After a failure the other ranks, which may wait for the failed one in a collective, get a few seconds
        to return.
        """
        answers: dict[int, tuple[bool, Any, int]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            failed = any(not ok for ok, *_ in answers.values())
            ready = multiprocessing.connection.wait(list(waiting), SECONDS_AFTER_FAILURE if failed else None)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, "the process has ended", 0)
        return answers

    def close(self) -> None:
        """End the processes."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=30)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self._folder.name) / "rendezvous"
        context = fork_context()
        for rank in range(self.world_size):
            local_end, remote_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, str(rendezvous), remote_end), daemon=True
            )
            process.start()
            remote_end.close()
            self._pipes.append(local_end)
            self._processes.append(process)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)


_groups = contextlib.ExitStack()
_topology: dict[tuple[int, ...], Topology] = {}
_created_sets: list[tuple[int, ...]] = []


def in_layout(config: ParallelConfig, *, seed: int = 1) -> Topology:
    """Return the topology of a layout on a rank, with newly seeded random states.

    Creating a set of groups takes a tenth of a second on each rank, so the groups are kept until a test uses
    another layout.
    """
    import torch

    from sas_megatron.distributed import topology

    layout = (config.tensor, config.context, config.pipeline, config.virtual_pipeline)
    if layout not in _topology:
        _topology.clear()
        _groups.close()
        _created_sets.append(layout)
        joined = topology.joined_groups(config, device=torch.device("cpu"), seed=seed)
        _topology[layout] = _groups.enter_context(joined)
    found = _topology[layout]
    sample_rank = found.data_rank * config.context + found.context_rank
    topology.seed_randomness(seed, sample_rank, found.pipeline_rank)
    return found


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    # A rank that is stopped would not notice the end of the test process.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    from sas_megatron.platform.device import prepare_device

    prepare_device()

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_gloo_device()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args), len(_created_sets)))
        except Exception:
            pipe.send((False, traceback.format_exc(), len(_created_sets)))
    dist.barrier()
    _groups.close()
    dist.destroy_process_group()


def _share_gloo_device() -> None:
    """Let all groups of this process use one gloo device.

    By default each group has its own device, whose thread wakes up a hundred times per second. The dozens of
    groups of a few layouts would keep a processor busy.
    """
    from torch.distributed import ProcessGroupGloo

    device = ProcessGroupGloo.create_default_device()
    initialize = ProcessGroupGloo.__init__

    def initialize_on_device(group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [device]
        options._timeout = timeout
        initialize(group, store, rank, size, options)

    ProcessGroupGloo.__init__ = initialize_on_device  # type: ignore[method-assign]
