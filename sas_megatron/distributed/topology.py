"""The process groups of a run: initialization under any launcher, this rank's position, shutdown."""

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
from sas_megatron.distributed.communication_counter import CommunicationCounter
from sas_megatron.fault_tolerance.failure_watchdog import FailureWatchdog
from sas_megatron.fault_tolerance.final_report import COMMAND, Activity
from sas_megatron.fault_tolerance.flight_recorder import FlightRecorder
from sas_megatron.fault_tolerance.rendezvous import connect_to_store
from sas_megatron.platform.device import process_group_backend


@dataclass(frozen=True)
class Topology:
    """The position of this rank in the run, and its process groups."""

    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    tensor_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    # Includes the context ranks: losses and token counts are summed over it.
    data_group: dist.ProcessGroup
    context_rank: int
    context_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_group: dist.ProcessGroup
    # None if the world was initialized by other code.
    failure_watchdog: FailureWatchdog | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes the files of the run."""
        return self.rank == 0

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """Return the groups that collectives run in, by the names that reports use."""
        return {
            "tensor": self.tensor_group,
            "context": self.context_group,
            "pipeline": self.pipeline_group,
            "data": self.data_group,
        }

    def sum_over_data_and_pipeline(self, totals: torch.Tensor) -> None:
        """Sum totals of samples or tokens in place, over the data, context and pipeline ranks.

        The last pipeline stages have the values, and the other stages pass zeros. All ranks get the same
        sums.
        """
        dist.all_reduce(totals, group=self.data_group)
        dist.all_reduce(totals, group=self.pipeline_group)

    def sum_over_all_ranks(self, totals: torch.Tensor) -> None:
        """Sum totals in place over all ranks; totals of samples are counted once per tensor rank.

        All ranks get bit-identical sums, so that decisions based on them are the same everywhere.
        """
        self.sum_over_data_and_pipeline(totals)
        dist.all_reduce(totals, group=self.tensor_group)


def build_communication_counter(topology: Topology) -> CommunicationCounter:
    """Return the communication counter of a training run.

    Megatron-core sends activations between pipeline stages over the world group, so point-to-point messages
    count as "pipeline". The group of the gradient norm and any others count as "other".
    """
    return CommunicationCounter(topology.groups(), point_to_point="pipeline")


@contextlib.contextmanager
def joined_topology(
    config: ParallelConfig,
    *,
    device: torch.device,
    seed: int,
    timeout_minutes: float,
    handles_signal: Callable[[int], bool] = lambda _number: False,
    flight_records: Path | None = None,
    activity: Activity = COMMAND,
) -> Iterator[Topology]:
    """Initialize the world and its groups, yield the topology, and destroy them on exit.

    With more than one rank, an error or a signal inside the block ends the process: see `FailureWatchdog`.

    Args:
        config: Sizes of the groups.
        device: The device of this rank, which determines the backend.
        seed: Seed of dropout, the same on all ranks.
        timeout_minutes: Timeout of collectives in every group.
        handles_signal: Whether the application handles a signal itself.
        flight_records: Directory for each rank's last collectives if the run hangs.
        activity: What the ranks do, for the report of a failure.
    """
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = connect_to_store(timeout)
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
        # NCCL then connects all ranks here, once, and makes the other groups by splitting this one.
        device_id=device if device.type == "cuda" else None,
    )
    try:
        with (
            FailureWatchdog(
                store,
                rank=rank,
                world_size=world_size,
                timeout_minutes=timeout_minutes,
                handles_signal=handles_signal,
                flight_recorder=recorder,
                activity=activity,
            ) as watchdog,
            joined_groups(config, device=device, seed=seed, timeout_minutes=timeout_minutes) as topology,
        ):
            yield replace(topology, failure_watchdog=watchdog)
            # Without this barrier about one two-rank gloo run in six aborts at exit. It is skipped after an
            # error, when the other ranks may never reach it.
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def joined_groups(
    config: ParallelConfig, *, device: torch.device, seed: int, timeout_minutes: float = 10.0
) -> Iterator[Topology]:
    """Initialize Megatron-core's groups in an existing world, seed dropout, and destroy them on exit."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config),
        context_parallel_size=config.context,
        # Only checkpoints in Megatron-core's own format use them.
        create_gloo_process_groups=False,
        # Megatron-core's groups do not inherit the world's timeout. It accepts a float, though annotated as
        # int.
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
    """Return the model chunks per pipeline stage for Megatron-core; None without interleaved stages."""
    return config.virtual_pipeline if config.virtual_pipeline > 1 else None


def seed_randomness(seed: int, sample_rank: int, pipeline_rank: int) -> None:
    """Seed dropout: equal on all tensor ranks outside tensor-parallel regions, different inside them.

    It also differs between data and context ranks (`sample_rank`), which process different tokens, and
    between pipeline ranks, which hold different layers. Inside tensor-parallel regions Megatron-core adds the
    tensor rank and a large constant to the seed.
    """
    rank_seed = seed + 100 * sample_rank + 100_003 * pipeline_rank
    torch.manual_seed(rank_seed)
    model_parallel_cuda_manual_seed(rank_seed)
