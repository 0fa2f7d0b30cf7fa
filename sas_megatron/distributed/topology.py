"""Process groups of a run: who this rank is, from whatever launcher started it, and a clean end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.fault_tolerance.failure_watchdog import FailureWatchdog
from sas_megatron.fault_tolerance.flight_recorder import FlightRecorder
from sas_megatron.fault_tolerance.rendezvous import meet
from sas_megatron.platform.device import process_group_backend


@dataclass(frozen=True)
class Topology:
    """This rank's place in the run."""

    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    tensor_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    # With the context ranks: what losses and token counts are summed over.
    data_group: dist.ProcessGroup
    context_rank: int
    context_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_group: dist.ProcessGroup
    # None in a world that was joined elsewhere.
    roll_call: FailureWatchdog | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes the run's files."""
        return self.rank == 0

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups that collectives run in, by the names that reports use."""
        return {
            "tensor": self.tensor_group,
            "context": self.context_group,
            "pipeline": self.pipeline_group,
            "data": self.data_group,
        }

    def sum_reports(self, totals: torch.Tensor) -> None:
        """Adds up, in place, what the pipelines' last stages report of their samples and tokens.

        The other stages give zeros; all ranks end with the same.
        """
        dist.all_reduce(totals, group=self.data_group)
        dist.all_reduce(totals, group=self.pipeline_group)

    def sum_over_all(self, totals: torch.Tensor) -> None:
        """Adds up, in place, what all ranks tell; reports of samples count once for each tensor rank.

        All ranks end with the same to the bit, so that they can decide alike.
        """
        self.sum_reports(totals)
        dist.all_reduce(totals, group=self.tensor_group)


@contextlib.contextmanager
def joined_topology(
    config: ParallelConfig,
    *,
    device: torch.device,
    seed: int,
    timeout_minutes: float,
    takes_signal: Callable[[int], bool] = lambda _number: False,
    flight_records: Path | None = None,
) -> Iterator[Topology]:
    """Joins the world and its groups for the length of a `with` block, and leaves in good order.

    In a world of several ranks an error or a signal within ends the process: see `FailureWatchdog`.
    Ranks that hang leave their last collectives in the folder `flight_records`.
    """
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = meet(timeout)
    backend = process_group_backend(device)
    recorder = FlightRecorder(flight_records, rank=rank) if flight_records is not None else None
    if recorder is not None:
        recorder.prepare(backend)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        with (
            FailureWatchdog(
                store,
                rank=rank,
                world_size=world_size,
                timeout_minutes=timeout_minutes,
                takes_signal=takes_signal,
                flight_recorder=recorder,
            ) as roll_call,
            joined_groups(config, device=device, seed=seed, timeout_minutes=timeout_minutes) as topology,
        ):
            yield replace(topology, roll_call=roll_call)
            # Without it about one two-rank gloo run in six aborts at exit. After an error the other
            # ranks may never come here, so then it is left out.
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def joined_groups(
    config: ParallelConfig, *, device: torch.device, seed: int, timeout_minutes: float = 10.0
) -> Iterator[Topology]:
    """Megatron-core's groups of one layout, within a world that is joined already; seeds randomness too."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config),
        context_parallel_size=config.context,
        # Its groups do not inherit the world's timeout. A fraction is fine, though annotated as int.
        distributed_timeout_minutes=timeout_minutes,
    )
    try:
        data_rank = parallel_state.get_data_parallel_rank()
        context_rank = parallel_state.get_context_parallel_rank()
        pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        seed_randomness(seed, data_rank * config.context + context_rank, pipeline_rank)
        yield Topology(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            data_rank=data_rank,
            data_size=parallel_state.get_data_parallel_world_size(),
            data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            context_rank=context_rank,
            context_group=parallel_state.get_context_parallel_group(),
            pipeline_rank=pipeline_rank,
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        )
    finally:
        parallel_state.destroy_model_parallel()


def virtual_pipeline_size(config: ParallelConfig) -> int | None:
    """Pieces of each stage as Megatron-core takes them: None where stages do not interleave."""
    return config.virtual_pipeline if config.virtual_pipeline > 1 else None


def seed_randomness(seed: int, sample_rank: int, pipeline_rank: int) -> None:
    """Seeds dropout: equal over the tensor group outside tensor-parallel regions, different inside them.

    It differs over the data and context groups as well, whose ranks (`sample_rank`) see other tokens,
    and over the pipeline, whose ranks have other layers. (Megatron-core adds the tensor rank and a
    large constant by itself inside tensor-parallel regions.)
    """
    own = seed + 100 * sample_rank + 100_003 * pipeline_rank
    torch.manual_seed(own)
    model_parallel_cuda_manual_seed(own)
