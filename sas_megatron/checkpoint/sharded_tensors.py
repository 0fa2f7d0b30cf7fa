"""The local tensors of a rank as shards of full tensors with global names, for any layout.

    local parameter, or the run of its elements that this rank's distributed optimizer holds
        -> blocks of the full parameter   (one run, or one strided shard, consists of several blocks)
        -> one ShardedTensor of Megatron-core per block

A block is a rectangular region, the only region that torch's distributed format can position. The shards
follow from the attributes that tensor-parallel layers set on their parameters, so the same code serves every
attention; the layers' own `sharded_state_dict` is not called.
"""

from __future__ import annotations

import math
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

from sas_megatron.model.initialization import full_shape, global_name

# A block and its offsets in a larger tensor.
Block = tuple[torch.Tensor, tuple[int, ...]]


def shard_weights(model_chunks: list[Any]) -> list[ShardedTensor]:
    """Return all parameters of this rank's model chunks as shards, which are views of the parameters."""
    return [
        shard
        for model_chunk in model_chunks
        for name, parameter in model_chunk.named_parameters()
        for shard in shard_parameter(model_chunk, name, parameter, parameter.detach())
    ]


def shard_parameter(
    model_chunk: Any,
    name: str,
    parameter: nn.Parameter,
    values: torch.Tensor,
    *,
    first_element: int = 0,
    prefix: str = "",
) -> list[ShardedTensor]:
    """Return `values`, which correspond to elements of a local parameter, as shards of a full tensor.

    The shards are views of `values`.

    Args:
        model_chunk: The model chunk that holds the parameter.
        name: Name of the parameter in the model chunk.
        parameter: The local parameter.
        values: One value per element: either in the shape of the parameter, or flat for a run of elements.
        first_element: Index of the first element of the run in the flattened parameter.
        prefix: Prefix of the global name.
    """
    full_name = global_name(model_chunk, name)
    return [
        ShardedTensor(
            key=prefix + full_name,
            data=block,
            dtype=block.dtype,
            local_shape=tuple(block.shape),
            global_shape=tuple(full_shape(parameter)),
            global_offset=offset,
            axis_fragmentations=None,  # The blocks form no regular grid.
        )
        for local_block, local_offset in split_run_into_blocks(values, tuple(parameter.shape), first_element)
        for block, offset in _blocks_of_full_parameter(local_block, local_offset, parameter)
    ]


def split_run_into_blocks(
    values: torch.Tensor, shape: tuple[int, ...], first_element: int
) -> Iterator[Block]:
    """Split a run of consecutive elements of a contiguous tensor into blocks, in memory order.

    Each dimension gives at most one block for an incomplete row at either end, and one for all rows in
    between.

    Args:
        values: The elements, flat, or all elements of the tensor in its shape.
        shape: Shape of the tensor.
        first_element: Index of the first element of the run in the flattened tensor.
    """
    if tuple(values.shape) == shape:
        yield values, (0,) * len(shape)
        return
    if len(shape) == 1:
        yield values, (first_element,)
        return
    row_size = math.prod(shape[1:])
    done = 0
    while done < values.numel():
        row, column = divmod(first_element + done, row_size)
        num_full_rows = (values.numel() - done) // row_size
        if column == 0 and num_full_rows:
            block = values.narrow(0, done, num_full_rows * row_size).view(num_full_rows, *shape[1:])
            yield block, (row,) + (0,) * (len(shape) - 1)
            done += num_full_rows * row_size
            continue
        incomplete_row = values.narrow(0, done, min(row_size - column, values.numel() - done))
        for block, offset in split_run_into_blocks(incomplete_row, shape[1:], column):
            yield block.unsqueeze(0), (row, *offset)
        done += incomplete_row.numel()


def _blocks_of_full_parameter(
    block: torch.Tensor, offset: tuple[int, ...], parameter: nn.Parameter
) -> Iterator[Block]:
    """Split a block of the local parameter into blocks of the full parameter.

    With a partition stride s, the full parameter consists of s sections, and the local parameter holds one
    segment of each section.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        yield block, offset
        return
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    num_ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    length = parameter.shape[dim] // stride  # of one segment
    begin, end = offset[dim], offset[dim] + block.shape[dim]
    for section in range(begin // length, -(-end // length)):
        low, high = max(begin, section * length), min(end, (section + 1) * length)
        full_offset = (section * num_ranks + rank) * length + low - section * length
        yield block.narrow(dim, low - begin, high - low), (*offset[:dim], full_offset, *offset[dim + 1 :])


def shard_by_rank(name: str, values: torch.Tensor, *, rank: int, num_ranks: int) -> ShardedTensor:
    """Return a tensor that every rank has, as row `rank` of a tensor with one row per rank."""
    return ShardedTensor(
        key=name,
        data=values.unsqueeze(0),
        dtype=values.dtype,
        local_shape=(1, *values.shape),
        global_shape=(num_ranks, *values.shape),
        global_offset=(rank, *(0 for _ in values.shape)),
        axis_fragmentations=None,
    )


def group_by_name(shards: Iterable[ShardedTensor]) -> dict[str, torch.Tensor]:
    """Return the shards grouped by full tensor, as torch's distributed format expects them."""
    grouped: dict[str, list[Any]] = defaultdict(list)
    for shard in shards:
        grouped[shard.key].append(CheckpointableShardedTensor.from_sh_ten(shard))
    return {name: LocalShardsContainer(parts) for name, parts in grouped.items()}
