"""The random states of all ranks, which dropout draws from."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from sas_megatron.checkpoint.sharded_tensors import shard_by_rank
from sas_megatron.checkpoint.tensor_reading import RANDOM_PREFIX

_TRACKED = "tracked."


def read_random_states() -> dict[str, torch.Tensor]:
    """This rank's, copied: of the CPU, of the device, and those that Megatron-core's tracker keeps."""
    tracked = get_cuda_rng_tracker().get_states()
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    states.update({f"{_TRACKED}{name}": state for name, state in tracked.items()})
    return {name: state.cpu().clone() for name, state in states.items()}


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Goes on where `read_random_states` was called."""
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["device"])
    tracked = {
        name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)
    }
    get_cuda_rng_tracker().set_states(tracked)


def shard_random_states(states: dict[str, torch.Tensor]) -> list[ShardedTensor]:
    """A row of each for every rank, as views of `states`."""
    return [
        shard_by_rank(RANDOM_PREFIX + name, state, rank=dist.get_rank(), num_ranks=dist.get_world_size())
        for name, state in states.items()
    ]
