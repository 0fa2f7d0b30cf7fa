"""What a rank's tensors are parts of, whatever the layout: boxes within whole tensors of global names.

    parameter of a rank, or this rank's run of its elements (distributed optimizer)
        -> boxes of the whole parameter   (a run of elements is some boxes; so is a strided part)
        -> Megatron-core's ShardedTensor of each

Derived from the attributes that tensor-parallel layers give their parameters, as initial weights
are, so one way serves every attention; layers' own `sharded_state_dict` is not asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from torch import nn

from sas_megatron.checkpoint.boxes import Box, boxes_of_run
from sas_megatron.model.initialization import full_shape, global_name


def shard_weights(pieces: list[Any]) -> list[ShardedTensor]:
    """All parameters of this rank's pieces, as views."""
    return [
        shard
        for piece in pieces
        for name, parameter in piece.named_parameters()
        for shard in shard_parameter(piece, name, parameter, parameter.detach())
    ]


def shard_parameter(
    piece: Any,
    name: str,
    parameter: nn.Parameter,
    values: torch.Tensor,
    *,
    first_element: int = 0,
    prefix: str = "",
) -> list[ShardedTensor]:
    """Views of `values`, which belong to a parameter of `piece`, by their places in the whole parameter.

    Args:
        piece: The part of the model that holds it.
        name: Its name there.
        parameter: What it is.
        values: A number for each of its elements: of its shape; or flat, for a run of them.
        first_element: Where that run begins.
        prefix: Before the parameter's global name.
    """
    whole_name = global_name(piece, name)
    whole = full_shape(parameter)
    return [
        ShardedTensor(
            key=prefix + whole_name,
            data=box,
            dtype=box.dtype,
            local_shape=tuple(box.shape),
            global_shape=tuple(whole),
            global_offset=offset,
            axis_fragmentations=None,  # no regular grid
        )
        for run, place in boxes_of_run(values, tuple(parameter.shape), first_element)
        for box, offset in _boxes_in_whole(run, place, parameter)
    ]


def _boxes_in_whole(box: torch.Tensor, place: tuple[int, ...], parameter: nn.Parameter) -> Iterator[Box]:
    """A box of this rank's part of a parameter -> boxes of the whole parameter.

    With a stride of s the part is s pieces, each from another s-th of the whole.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        yield box, place
        return
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    length = parameter.shape[dim] // stride  # of one piece
    begin, end = place[dim], place[dim] + box.shape[dim]
    for piece in range(begin // length, -(-end // length)):
        low, high = max(begin, piece * length), min(end, (piece + 1) * length)
        offset = (piece * ranks + rank) * length + low - piece * length
        yield box.narrow(dim, low - begin, high - low), (*place[:dim], offset, *place[dim + 1 :])


def shard_by_rank(name: str, values: torch.Tensor, *, rank: int, num_ranks: int) -> ShardedTensor:
    """A vector that each rank has one of, as a row of one matrix."""
    return ShardedTensor(
        key=name,
        data=values.unsqueeze(0),
        dtype=values.dtype,
        local_shape=(1, *values.shape),
        global_shape=(num_ranks, *values.shape),
        global_offset=(rank, *(0 for _ in values.shape)),
        axis_fragmentations=None,
    )


def by_name(shards: Iterable[ShardedTensor]) -> dict[str, torch.Tensor]:
    """As torch's distributed format takes them: all of one whole tensor together."""
    grouped: dict[str, list[Any]] = defaultdict(list)
    for shard in shards:
        grouped[shard.key].append(CheckpointableShardedTensor.from_sh_ten(shard))
    return {name: LocalShardsContainer(parts) for name, parts in grouped.items()}
