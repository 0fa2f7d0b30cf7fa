"""The fused head simulation: projected columns [T, W] -> simulated heads of query, key and value.

    forward    one kernel each for query, key and value, which reads its columns in place. Only the columns
               are saved for the backward pass
    backward   two kernels each, which recompute the expanded heads. The gradient of all columns is one
               tensor. Each program stores a partial sum of the gradients of the weights, and these are added
               in a fixed order

Each of query, key and value is a `HeadShard`. Its local heads are the r·count simulated heads of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sas_megatron.attention.sas.fused import head_kernels
from sas_megatron.attention.sas.fused.features import Tile, Tiling, compute_type, count_programs
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights
from sas_megatron.costs.kernel_tiles import padded_size, taps_at_once


class HeadColumns(NamedTuple):
    """Columns of the base heads of query, key or value within a token's projected columns.

    Megatron-core's projection orders the columns by group: the queries, the key and the value of the first
    group, then of the second, and so on.
    """

    # First column of the first head.
    first: int
    num_heads: int
    # Heads per group, and columns from one group to the next.
    per_group: int
    group_width: int
    head_dim: int

    def view(self, columns_TW: torch.Tensor) -> torch.Tensor:
        """Return a view [T, groups, heads of a group, D] of contiguous columns [T, W], W = (N+2G)·D."""
        groups = columns_TW.view(columns_TW.shape[0], -1, self.group_width // self.head_dim, self.head_dim)
        return groups.narrow(2, self.first // self.head_dim, self.per_group)


class HeadShard(NamedTuple):
    """One of query, key and value: its columns, its weights, and the base heads of this rank."""

    columns: HeadColumns
    # None: the heads are not simulated, and are returned as they are.
    weights: ResidualMapWeights | None
    base_heads: slice

    @property
    def blocks(self) -> int:
        """r, the number of simulated heads per base head; 1 without a simulation."""
        return 1 if self.weights is None else self.weights.expand.shape[0] // self.columns.num_heads

    @property
    def num_base_heads(self) -> int:
        """Number of base heads of this rank."""
        return int(self.base_heads.stop - self.base_heads.start)


def simulate_heads(
    columns_TW: torch.Tensor, shards: Sequence[HeadShard], *, tiling: Tiling
) -> tuple[torch.Tensor, ...]:
    """Compute the local simulated heads [T, r·count, D], contiguous, of each shard.

    Local head g·count + i is the copy in block g of base head `base_heads.start + i`.

    Args:
        columns_TW: Projected columns of T tokens, W = (N+2G)·D.
        shards: Query, key and value.
        tiling: Launch parameters of the kernels.
    """
    weights = [weight for shard in shards if shard.weights is not None for weight in shard.weights]
    simulated: tuple[torch.Tensor, ...] = _HeadSimulation.apply(columns_TW, shards, tiling, *weights)
    return simulated


class _HeadSimulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns_TW: torch.Tensor,
        shards: Sequence[HeadShard],
        tiling: Tiling,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        columns_TW = columns_TW.contiguous()
        ctx.tiling = tiling
        # The shards without their weights, which autograd has to save as tensors.
        ctx.shards = [(shard.columns, shard.weights is not None, shard.base_heads) for shard in shards]
        ctx.save_for_backward(columns_TW, *weights)
        return tuple(compute_heads(columns_TW, shard, tiling) for shard in shards)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        columns_TW, *weights = ctx.saved_tensors
        column_gradient = torch.empty_like(columns_TW)
        remaining = iter(weights)
        weight_gradients: list[torch.Tensor | None] = []
        for (columns, is_simulated, base_heads), gradient in zip(ctx.shards, gradients, strict=True):
            map_weights = ResidualMapWeights(*(next(remaining) for _ in range(4))) if is_simulated else None
            shard = HeadShard(columns, map_weights, base_heads)
            if map_weights is None:
                _copy_gradient(gradient, shard, column_gradient)
            else:
                weight_gradients += _differentiate(columns_TW, shard, gradient, column_gradient, ctx.tiling)
        return column_gradient, None, None, *weight_gradients


def compute_heads(columns_TW: torch.Tensor, shard: HeadShard, tiling: Tiling) -> torch.Tensor:
    """Compute the local heads of one shard, without autograd."""
    tokens, head_dim = columns_TW.shape[0], shard.columns.head_dim
    if shard.weights is None:
        heads: torch.Tensor = shard.columns.view(columns_TW).flatten(1, 2)[:, shard.base_heads]
        return heads.contiguous()
    simulated = columns_TW.new_empty(tokens, shard.blocks * shard.num_base_heads, head_dim)
    weights, tile = shard.weights, tiling.head_forward
    constants = _kernel_constants(shard, tile, columns_TW)
    head_kernels.head_forward[(_count_programs(tile, constants, columns_TW),)](
        columns_TW[:, shard.columns.first :],
        weights.expand,
        # Without biases, kernels get a weight as the pointer, and do not read it.
        weights.expand if weights.expand_bias is None else weights.expand_bias,
        weights.refine,
        weights.refine if weights.refine_bias is None else weights.refine_bias,
        simulated,
        tokens,
        columns_TW.stride(0),
        FIRST=shard.base_heads.start,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return simulated


def _differentiate(
    columns_TW: torch.Tensor,
    shard: HeadShard,
    gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    tiling: Tiling,
) -> list[torch.Tensor | None]:
    """Write the shard's columns of `column_gradient`, and return the gradients of its weights."""
    weights = _weights_of(shard)
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    strides = (columns_TW.shape[0], columns_TW.stride(0), gradient.stride(0), gradient.stride(1))
    expand, expand_bias = _launch_head_backward(
        columns_TW, shard, gradient, column_gradient, strides=strides, tile=tiling.head_backward
    )
    refine, refine_bias = _launch_refine_gradient(
        columns_TW, shard, gradient, strides=strides, tile=tiling.head_refine_gradient
    )
    return [
        expand.to(weights.expand.dtype),
        _scatter_rows(refine, shard, weights.refine),
        None if weights.expand_bias is None else expand_bias.to(weights.expand_bias.dtype),
        None if weights.refine_bias is None else _scatter_rows(refine_bias, shard, weights.refine_bias),
    ]


def _launch_head_backward(
    columns_TW: torch.Tensor,
    shard: HeadShard,
    gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    *,
    strides: tuple[int, ...],
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the shard's columns of `column_gradient`, and return the gradients of `expand` and its bias."""
    weights = _weights_of(shard)
    has_bias = weights.expand_bias is not None
    constants = _kernel_constants(shard, tile, columns_TW)
    programs = _count_programs(tile, constants, columns_TW)
    partials = _partial_sums(programs, weights.expand)
    bias_partials = _partial_sums(programs, weights.expand[:, 0, 0]) if has_bias else partials
    head_kernels.head_backward[(programs,)](
        columns_TW[:, shard.columns.first :],
        weights.expand,
        weights.expand if weights.expand_bias is None else weights.expand_bias,
        weights.refine,
        gradient,
        column_gradient[:, shard.columns.first :],
        partials,
        bias_partials,
        *strides,
        FIRST=shard.base_heads.start,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials.sum(0), bias_partials.sum(0) if has_bias else partials


def _launch_refine_gradient(
    columns_TW: torch.Tensor,
    shard: HeadShard,
    gradient: torch.Tensor,
    *,
    strides: tuple[int, ...],
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the local rows of `refine` and its bias, in float32."""
    weights = _weights_of(shard)
    has_bias = weights.expand_bias is not None
    num_local, num_simulated, taps = shard.blocks * shard.num_base_heads, *weights.refine.shape[1:]
    at_once = taps_at_once(taps, num_outputs=num_local, num_inputs=num_simulated)
    constants = _kernel_constants(shard, tile, columns_TW)
    programs = _count_programs(tile, constants, columns_TW)
    partials = _partial_sums(programs, weights.refine[:num_local])
    bias_partials = _partial_sums(programs, weights.refine[:num_local, 0, 0]) if has_bias else partials
    head_kernels.refine_gradient[(programs, taps // at_once)](
        columns_TW[:, shard.columns.first :],
        weights.expand,
        weights.expand if weights.expand_bias is None else weights.expand_bias,
        gradient,
        partials,
        bias_partials,
        *strides,
        TAPS_AT_ONCE=at_once,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials.sum(0), bias_partials.sum(0) if has_bias else partials


def _copy_gradient(gradient: torch.Tensor, shard: HeadShard, column_gradient: torch.Tensor) -> None:
    """Write the columns of `column_gradient` of a shard whose heads are not simulated."""
    groups, per_group = shard.columns.num_heads // shard.columns.per_group, shard.columns.per_group
    full = gradient
    if shard.num_base_heads != shard.columns.num_heads:
        full = gradient.new_zeros(gradient.shape[0], shard.columns.num_heads, gradient.shape[2])
        full[:, shard.base_heads] = gradient
    shard.columns.view(column_gradient).copy_(full.unflatten(1, (groups, per_group)))


def _scatter_rows(local_rows: torch.Tensor, shard: HeadShard, weight: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a weight from the rows of the local simulated heads; other rows are zero."""
    local_rows = local_rows.to(weight.dtype)
    if shard.num_base_heads == shard.columns.num_heads:
        return local_rows
    full = torch.zeros_like(weight)
    full.unflatten(0, (shard.blocks, -1))[:, shard.base_heads] = local_rows.unflatten(0, (shard.blocks, -1))
    return full


def _partial_sums(programs: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(programs, *like.shape, dtype=torch.float32, device=like.device)


def _weights_of(shard: HeadShard) -> ResidualMapWeights:
    assert shard.weights is not None, "only heads with weights are simulated"
    return shard.weights


def _kernel_constants(shard: HeadShard, tile: Tile, columns_TW: torch.Tensor) -> dict[str, Any]:
    """Return the constants that a kernel is compiled for."""
    weights = _weights_of(shard)
    feature_tile = padded_size(shard.columns.head_dim)
    return {
        "BASE": shard.columns.num_heads,
        "BLOCKS": shard.blocks,
        "COUNT": shard.num_base_heads,
        "HEAD_DIM": shard.columns.head_dim,
        "TAPS": weights.expand.shape[2],
        "PER_GROUP": shard.columns.per_group,
        "GROUP_WIDTH": shard.columns.group_width,
        "HAS_BIAS": weights.expand_bias is not None,
        "BASE_TILE": padded_size(shard.columns.num_heads),
        "ALL_TILE": padded_size(shard.blocks * shard.columns.num_heads),
        "LOCAL_TILE": padded_size(shard.blocks * shard.num_base_heads),
        "FEATURE_TILE": feature_tile,
        "TOKEN_TILE": max(1, tile.rows // feature_tile),
        "COMPUTE": compute_type(columns_TW.dtype, columns_TW.device),
    }


def _count_programs(tile: Tile, constants: dict[str, Any], columns_TW: torch.Tensor) -> int:
    return count_programs(tile, -(-columns_TW.shape[0] // constants["TOKEN_TILE"]), columns_TW.device)
