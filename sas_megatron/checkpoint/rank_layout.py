"""The layout of ranks that saved a checkpoint, and their random states.

Dropout draws from the random states of each rank, so they can be restored only on the same layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from sas_megatron.checkpoint.sharded_tensors import shard_by_rank
from sas_megatron.checkpoint.tensor_reading import RANDOM_PREFIX
from sas_megatron.config.run import RunConfig

_LAYOUT_FIELDS = (
    "tensor",
    "sequence",
    "context",
    "pipeline",
    "virtual_pipeline",
    "first_stage_layers",
    "last_stage_layers",
)
_TRACKED = "tracked."


def describe_layout(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine which rank draws dropout for which tokens and layers."""
    world_size = dist.get_world_size()
    return {
        **{name: getattr(config.parallel, name) for name in _LAYOUT_FIELDS},
        "data": world_size // config.parallel.model_size,
        "world_size": world_size,
        "micro_batch_size": config.training.micro_batch_size,
    }


def describe_layout_changes(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Return the differences of two layouts, such as `tensor 2 -> 4, data 2 -> 1`; empty if equal."""
    return ", ".join(
        f"{name} {saved.get(name)} -> {current.get(name)}"
        for name in dict.fromkeys([*saved, *current])
        if saved.get(name) != current.get(name)
    )


def read_random_states() -> dict[str, torch.Tensor]:
    """Return copies of this rank's random states: CPU, device, and Megatron-core's tracked states."""
    tracked = get_cuda_rng_tracker().get_states()
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    states.update({f"{_TRACKED}{name}": state for name, state in tracked.items()})
    return {name: state.cpu().clone() for name, state in states.items()}


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set this rank's random states to the result of an earlier `read_random_states`."""
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["device"])
    tracked = {
        name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)
    }
    get_cuda_rng_tracker().set_states(tracked)


def shard_random_states(states: dict[str, torch.Tensor]) -> list[ShardedTensor]:
    """Return one matrix per random state, with one row per rank; the local row is a view of `states`."""
    return [
        shard_by_rank(RANDOM_PREFIX + name, state, rank=dist.get_rank(), num_ranks=dist.get_world_size())
        for name, state in states.items()
    ]
