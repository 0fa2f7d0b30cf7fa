"""Process groups of a run: who this rank is, from whatever launcher started it, and a clean end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from sas_megatron.config.parallel import ParallelConfig
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

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes the run's files."""
        return self.rank == 0


@contextlib.contextmanager
def joined_topology(
    config: ParallelConfig, *, device: torch.device, seed: int, timeout_minutes: float
) -> Iterator[Topology]:
    """Joins the world and its groups for the length of a `with` block, and leaves in good order."""
    _join_world(device, timedelta(minutes=timeout_minutes))
    try:
        with joined_groups(config, device=device, seed=seed) as topology:
            yield topology
            # Without it about one two-rank gloo run in six aborts at exit. After an error the other
            # ranks may never come here, so then it is left out.
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def joined_groups(config: ParallelConfig, *, device: torch.device, seed: int) -> Iterator[Topology]:
    """Megatron-core's groups of one layout, within a world that is joined already; seeds randomness too."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config),
        context_parallel_size=config.context,
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


def _join_world(device: torch.device, timeout: timedelta) -> None:
    backend = process_group_backend(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    # A bare process is a world of one; it needs no address and no port.
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it, its stubs do not say so
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
