"""Ranks for tests: processes joined by gloo on loopback, started once for each world size."""

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


# Sets of groups that a rank makes before it is replaced by a fresh process: each leaves some thirty threads
# and their sockets, which no call frees.
SETS_OF_GROUPS = 16
# How long ranks may take to answer once one of them has failed.
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
        """Return the results by rank.

        Raises:
            AssertionError: the function failed on some ranks; with their tracebacks.
        """
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = self._answers()
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text, _) in sorted(answers.items()) if not ok]
        if failures:
            # Some may still wait for the others in a collective.
            self._kill()
        elif max(sets for *_, sets in answers.values()) >= SETS_OF_GROUPS:
            self.close()
        # The ranks of other world sizes would take a processor from those that run.
        self._signal(signal.SIGSTOP)
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _answers(self) -> dict[int, tuple[bool, Any, int]]:
        """Return what each rank sends: success, result or traceback, and sets of groups made.

        After a failure the others, which may wait for that rank in a collective, get some seconds to answer.
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
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, str(rendezvous), there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)


_groups = contextlib.ExitStack()
_topology: dict[tuple[int, ...], Topology] = {}
_sets_made: list[tuple[int, ...]] = []


def in_layout(config: ParallelConfig, *, seed: int = 1) -> Topology:
    """On a rank: the groups of a layout, kept until another one is asked for, and random state seeded anew.

    Making a set of groups takes a tenth of a second on each rank, so they are not made for every test.
    """
    import torch

    from sas_megatron.distributed import topology

    layout = (config.tensor, config.context, config.pipeline, config.virtual_pipeline)
    if layout not in _topology:
        _topology.clear()
        _groups.close()
        _sets_made.append(layout)
        joined = topology.joined_groups(config, device=torch.device("cpu"), seed=seed)
        _topology[layout] = _groups.enter_context(joined)
    place = _topology[layout]
    sample_rank = place.data_rank * config.context + place.context_rank
    topology.seed_randomness(seed, sample_rank, place.pipeline_rank)
    return place


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    # A rank that is stopped would not notice that the tests are gone.
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
            pipe.send((True, function(*args), len(_sets_made)))
        except Exception:
            pipe.send((False, traceback.format_exc(), len(_sets_made)))
    dist.barrier()
    _groups.close()
    dist.destroy_process_group()


def _share_gloo_device() -> None:
    """Let all groups of this process use one gloo device.

    By default each group has a device of its own, whose thread wakes up a hundred times a second: the dozens
    of groups of a few layouts keep a processor busy.
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
