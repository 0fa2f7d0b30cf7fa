"""The fused head simulation: projected columns [T, W] -> simulated heads of query, key and value.

    forward    one kernel each for query, key and value, which reads its columns in place. Only the columns
               are saved for the backward pass
    backward   two kernels each, which recompute the expanded heads. The gradient of all columns is one
               tensor. Each program stores a partial sum of the gradients of the weights, and these are added
               in a fixed order

Each of query, key and value is a `HeadPart`. Its local heads are the r·count simulated heads of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sas_megatron.attention.sas.fused import head_kernels
from sas_megatron.attention.sas.fused.head_parts import HeadPart
from sas_megatron.attention.sas.fused.tiling import (
    Tile,
    Tiling,
    compute_type,
    count_programs,
    padded,
    taps_at_once,
)
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights


def simulate_heads(
    columns_TW: torch.Tensor, parts: Sequence[HeadPart], *, tiling: Tiling
) -> tuple[torch.Tensor, ...]:
    """Compute the local simulated heads [T, r·count, D], contiguous, of each part.

    Local head g·count + i is the copy in block g of base head `base_heads.start + i`.

    Args:
        columns_TW: Projected columns of T tokens, W = (N+2G)·D.
        parts: Query, key and value.
        tiling: Launch parameters of the kernels.
    """
    weights = [weight for part in parts if part.weights is not None for weight in part.weights]
    simulated: tuple[torch.Tensor, ...] = _HeadSimulation.apply(columns_TW, parts, tiling, *weights)
    return simulated


class _HeadSimulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns_TW: torch.Tensor,
        parts: Sequence[HeadPart],
        tiling: Tiling,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        columns_TW = columns_TW.contiguous()
        ctx.tiling = tiling
        # The parts without their weights, which autograd has to save as tensors.
        ctx.parts = [(part.columns, part.weights is not None, part.base_heads) for part in parts]
        ctx.save_for_backward(columns_TW, *weights)
        return tuple(compute_heads(columns_TW, part, tiling) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        columns_TW, *weights = ctx.saved_tensors
        column_gradient = torch.empty_like(columns_TW)
        remaining = iter(weights)
        weight_gradients: list[torch.Tensor | None] = []
        for (columns, is_simulated, base_heads), gradient in zip(ctx.parts, gradients, strict=True):
            own = ResidualMapWeights(*(next(remaining) for _ in range(4))) if is_simulated else None
            part = HeadPart(columns, own, base_heads)
            if own is None:
                _copy_gradient(gradient, part, column_gradient)
            else:
                weight_gradients += _differentiate(columns_TW, part, gradient, column_gradient, ctx.tiling)
        return column_gradient, None, None, *weight_gradients


def compute_heads(columns_TW: torch.Tensor, part: HeadPart, tiling: Tiling) -> torch.Tensor:
    """Compute the local heads of one part, without autograd."""
    tokens, head_dim = columns_TW.shape[0], part.columns.head_dim
    if part.weights is None:
        heads: torch.Tensor = part.columns.of(columns_TW).flatten(1, 2)[:, part.base_heads]
        return heads.contiguous()
    simulated = columns_TW.new_empty(tokens, part.blocks * part.num_wanted, head_dim)
    weights, tile = part.weights, tiling.head_forward
    constants = _kernel_constants(part, tile, columns_TW)
    head_kernels.head_forward[(_count_programs(tile, constants, columns_TW),)](
        columns_TW[:, part.columns.first :],
        weights.expand,
        # Without biases, kernels get a weight as the pointer, and do not read it.
        weights.expand if weights.expand_bias is None else weights.expand_bias,
        weights.refine,
        weights.refine if weights.refine_bias is None else weights.refine_bias,
        simulated,
        tokens,
        columns_TW.stride(0),
        FIRST=part.base_heads.start,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return simulated


def _differentiate(
    columns_TW: torch.Tensor,
    part: HeadPart,
    gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    tiling: Tiling,
) -> list[torch.Tensor | None]:
    """Write the part's columns of `column_gradient`, and return the gradients of its weights."""
    weights = _weights_of(part)
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    strides = (columns_TW.shape[0], columns_TW.stride(0), gradient.stride(0), gradient.stride(1))
    expand, expand_bias = _launch_head_backward(
        columns_TW, part, gradient, column_gradient, strides=strides, tile=tiling.head_backward
    )
    refine, refine_bias = _launch_refine_gradient(
        columns_TW, part, gradient, strides=strides, tile=tiling.head_refine_gradient
    )
    return [
        expand.to(weights.expand.dtype),
        _scatter_rows(refine, part, weights.refine),
        None if weights.expand_bias is None else expand_bias.to(weights.expand_bias.dtype),
        None if weights.refine_bias is None else _scatter_rows(refine_bias, part, weights.refine_bias),
    ]


def _launch_head_backward(
    columns_TW: torch.Tensor,
    part: HeadPart,
    gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    *,
    strides: tuple[int, ...],
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the part's columns of `column_gradient`, and return the gradients of `expand` and its bias."""
    weights = _weights_of(part)
    has_bias = weights.expand_bias is not None
    constants = _kernel_constants(part, tile, columns_TW)
    programs = _count_programs(tile, constants, columns_TW)
    partials = _partial_sums(programs, weights.expand)
    bias_partials = _partial_sums(programs, weights.expand[:, 0, 0]) if has_bias else partials
    head_kernels.head_backward[(programs,)](
        columns_TW[:, part.columns.first :],
        weights.expand,
        weights.expand if weights.expand_bias is None else weights.expand_bias,
        weights.refine,
        gradient,
        column_gradient[:, part.columns.first :],
        partials,
        bias_partials,
        *strides,
        FIRST=part.base_heads.start,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials.sum(0), bias_partials.sum(0) if has_bias else partials


def _launch_refine_gradient(
    columns_TW: torch.Tensor,
    part: HeadPart,
    gradient: torch.Tensor,
    *,
    strides: tuple[int, ...],
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the local rows of `refine` and its bias, in float32."""
    weights = _weights_of(part)
    has_bias = weights.expand_bias is not None
    num_local, num_simulated, taps = part.blocks * part.num_wanted, *weights.refine.shape[1:]
    at_once = taps_at_once(taps, own=num_local, every=num_simulated)
    constants = _kernel_constants(part, tile, columns_TW)
    programs = _count_programs(tile, constants, columns_TW)
    partials = _partial_sums(programs, weights.refine[:num_local])
    bias_partials = _partial_sums(programs, weights.refine[:num_local, 0, 0]) if has_bias else partials
    head_kernels.refine_gradient[(programs, taps // at_once)](
        columns_TW[:, part.columns.first :],
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


def _copy_gradient(gradient: torch.Tensor, part: HeadPart, column_gradient: torch.Tensor) -> None:
    """Write the columns of `column_gradient` of a part whose heads are not simulated."""
    groups, per_group = part.columns.num_heads // part.columns.per_group, part.columns.per_group
    full = gradient
    if part.num_wanted != part.columns.num_heads:
        full = gradient.new_zeros(gradient.shape[0], part.columns.num_heads, gradient.shape[2])
        full[:, part.base_heads] = gradient
    part.columns.of(column_gradient).copy_(full.unflatten(1, (groups, per_group)))


def _scatter_rows(local_rows: torch.Tensor, part: HeadPart, weight: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a weight from the rows of the local simulated heads; other rows are zero."""
    local_rows = local_rows.to(weight.dtype)
    if part.num_wanted == part.columns.num_heads:
        return local_rows
    full = torch.zeros_like(weight)
    full.unflatten(0, (part.blocks, -1))[:, part.base_heads] = local_rows.unflatten(0, (part.blocks, -1))
    return full


def _partial_sums(programs: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(programs, *like.shape, dtype=torch.float32, device=like.device)


def _weights_of(part: HeadPart) -> ResidualMapWeights:
    assert part.weights is not None, "only heads with weights are simulated"
    return part.weights


def _kernel_constants(part: HeadPart, tile: Tile, columns_TW: torch.Tensor) -> dict[str, Any]:
    """Return the constants that a kernel is compiled for."""
    weights = _weights_of(part)
    feature_tile = padded(part.columns.head_dim)
    return {
        "BASE": part.columns.num_heads,
        "BLOCKS": part.blocks,
        "COUNT": part.num_wanted,
        "HEAD_DIM": part.columns.head_dim,
        "TAPS": weights.expand.shape[2],
        "PER_GROUP": part.columns.per_group,
        "GROUP_WIDTH": part.columns.group_width,
        "HAS_BIAS": weights.expand_bias is not None,
        "BASE_TILE": padded(part.columns.num_heads),
        "ALL_TILE": padded(part.blocks * part.columns.num_heads),
        "LOCAL_TILE": padded(part.blocks * part.num_wanted),
        "FEATURE_TILE": feature_tile,
        "TOKEN_TILE": max(1, tile.rows // feature_tile),
        "COMPUTE": compute_type(columns_TW.dtype, columns_TW.device),
    }


def _count_programs(tile: Tile, constants: dict[str, Any], columns_TW: torch.Tensor) -> int:
    return count_programs(tile, -(-columns_TW.shape[0] // constants["TOKEN_TILE"]), columns_TW.device)
