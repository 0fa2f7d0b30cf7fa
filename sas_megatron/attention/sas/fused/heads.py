"""The fused head simulation: projected columns [T, C] -> simulated heads of query, key and value.

forward    one kernel for each, which reads its columns in place and keeps nothing but them
backward   two kernels for each, which compute the expanded heads again; the gradient of all columns
           is one tensor. Gradients of weights are sums a program, added up in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sas_megatron.attention.sas.fused import head_kernels
from sas_megatron.attention.sas.fused.head_parts import HeadPart
from sas_megatron.attention.sas.fused.padding import padded, taps_at_once
from sas_megatron.attention.sas.fused.tiling import Tile, Tiling, compute_type, count_programs
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights


def simulate_heads(
    columns_TC: torch.Tensor, parts: Sequence[HeadPart], *, tiling: Tiling
) -> tuple[torch.Tensor, ...]:
    """Of each part [T, r·count, D], contiguous; head g·count + i is base head `first + i` of block g."""
    weights = [weight for part in parts if part.weights is not None for weight in part.weights]
    simulated: tuple[torch.Tensor, ...] = _HeadSimulation.apply(columns_TC, parts, tiling, *weights)
    return simulated


class _HeadSimulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns_TC: torch.Tensor,
        parts: Sequence[HeadPart],
        tiling: Tiling,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        columns_TC = columns_TC.contiguous()
        ctx.tiling = tiling
        # Without the weights, which are kept as autograd keeps tensors.
        ctx.parts = [(part.columns, part.weights is not None, part.base_heads) for part in parts]
        ctx.save_for_backward(columns_TC, *weights)
        return tuple(compute_heads(columns_TC, part, tiling) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        columns_TC, *weights = ctx.saved_tensors
        column_gradient = torch.empty_like(columns_TC)
        remaining = iter(weights)
        weight_gradients: list[torch.Tensor | None] = []
        for (columns, simulated, base_heads), gradient in zip(ctx.parts, gradients, strict=True):
            own = ResidualMapWeights(*(next(remaining) for _ in range(4))) if simulated else None
            part = HeadPart(columns, own, base_heads)
            if own is None:
                _pass_back(gradient, part, column_gradient)
            else:
                weight_gradients += _differentiate(columns_TC, part, gradient, column_gradient, ctx.tiling)
        return column_gradient, None, None, *weight_gradients


def compute_heads(columns_TC: torch.Tensor, part: HeadPart, tiling: Tiling) -> torch.Tensor:
    """The forward pass alone of one part."""
    tokens, width = columns_TC.shape[0], part.columns.head_dim
    if part.weights is None:
        heads: torch.Tensor = part.columns.of(columns_TC).flatten(1, 2)[:, part.base_heads]
        return heads.contiguous()
    simulated = columns_TC.new_empty(tokens, part.blocks * part.num_wanted, width)
    weights = part.weights
    tile, shape = tiling.head_forward, _shape(part, tiling.head_forward, columns_TC)
    head_kernels.head_forward[(_count_tiles(tile, shape, columns_TC),)](
        columns_TC[:, part.columns.first :],
        weights.expand,
        weights.expand if weights.expand_bias is None else weights.expand_bias,
        weights.refine,
        weights.refine if weights.refine_bias is None else weights.refine_bias,
        simulated,
        tokens,
        columns_TC.stride(0),
        FIRST=part.base_heads.start,
        **shape,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return simulated


def _differentiate(
    columns_TC: torch.Tensor,
    part: HeadPart,
    gradient: torch.Tensor,
    column_gradient: torch.Tensor,
    tiling: Tiling,
) -> list[torch.Tensor | None]:
    """Writes the part's columns of `column_gradient`; returns the gradients of its weights."""
    assert part.weights is not None
    weights = part.weights
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    has_bias = weights.expand_bias is not None
    own = part.blocks * part.num_wanted
    columns = columns_TC[:, part.columns.first :]
    expand_bias = weights.expand if weights.expand_bias is None else weights.expand_bias
    strides = (columns_TC.shape[0], columns_TC.stride(0), gradient.stride(0), gradient.stride(1))

    tile = tiling.head_backward
    shape = _shape(part, tile, columns_TC)
    programs = _count_tiles(tile, shape, columns_TC)
    expand_parts = _sums(programs, weights.expand)
    expand_bias_parts = _sums(programs, weights.expand[:, 0, 0]) if has_bias else expand_parts
    head_kernels.head_backward[(programs,)](
        columns,
        weights.expand,
        expand_bias,
        weights.refine,
        gradient,
        column_gradient[:, part.columns.first :],
        expand_parts,
        expand_bias_parts,
        *strides,
        FIRST=part.base_heads.start,
        **shape,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )

    tile = tiling.head_refine_gradient
    shape = _shape(part, tile, columns_TC)
    taps = weights.refine.shape[2]
    at_once = taps_at_once(taps, own=own, every=weights.refine.shape[0])
    programs = _count_tiles(tile, shape, columns_TC)
    refine_parts = _sums(programs, weights.refine[:own])
    refine_bias_parts = _sums(programs, weights.refine[:own, 0, 0]) if has_bias else refine_parts
    head_kernels.refine_gradient[(programs, taps // at_once)](
        columns,
        weights.expand,
        expand_bias,
        gradient,
        refine_parts,
        refine_bias_parts,
        *strides,
        TAPS_AT_ONCE=at_once,
        **shape,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return [
        expand_parts.sum(0).to(weights.expand.dtype),
        _among_all(refine_parts.sum(0), part, weights.refine),
        None if weights.expand_bias is None else expand_bias_parts.sum(0).to(weights.expand_bias.dtype),
        None
        if weights.refine_bias is None
        else _among_all(refine_bias_parts.sum(0), part, weights.refine_bias),
    ]


def _pass_back(gradient: torch.Tensor, part: HeadPart, column_gradient: torch.Tensor) -> None:
    """Of heads that were passed on as they are."""
    groups, per_group = part.columns.num_heads // part.columns.per_group, part.columns.per_group
    whole = gradient
    if part.num_wanted != part.columns.num_heads:
        whole = gradient.new_zeros(gradient.shape[0], part.columns.num_heads, gradient.shape[2])
        whole[:, part.base_heads] = gradient
    part.columns.of(column_gradient).copy_(whole.unflatten(1, (groups, per_group)))


def _among_all(own_rows: torch.Tensor, part: HeadPart, weight: torch.Tensor) -> torch.Tensor:
    """Rows of the own simulated heads in their places among all, zeros elsewhere."""
    if part.num_wanted == part.columns.num_heads:
        return own_rows.to(weight.dtype)
    whole = torch.zeros_like(weight)
    whole.unflatten(0, (part.blocks, -1))[:, part.base_heads] = own_rows.unflatten(0, (part.blocks, -1)).to(
        weight.dtype
    )
    return whole


def _sums(programs: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(programs, *like.shape, dtype=torch.float32, device=like.device)


def _shape(part: HeadPart, tile: Tile, columns_TC: torch.Tensor) -> dict[str, Any]:
    """What a kernel is compiled for."""
    assert part.weights is not None
    feature_tile = padded(part.columns.head_dim)
    return {
        "BASE": part.columns.num_heads,
        "BLOCKS": part.blocks,
        "COUNT": part.num_wanted,
        "FEATURES": part.columns.head_dim,
        "TAPS": part.weights.expand.shape[2],
        "PER_GROUP": part.columns.per_group,
        "GROUP_WIDTH": part.columns.group_width,
        "HAS_BIAS": part.weights.expand_bias is not None,
        "BASE_TILE": padded(part.columns.num_heads),
        "ALL_TILE": padded(part.blocks * part.columns.num_heads),
        "OWN_TILE": padded(part.blocks * part.num_wanted),
        "FEATURE_TILE": feature_tile,
        "TOKEN_TILE": max(1, tile.rows // feature_tile),
        "COMPUTE": compute_type(columns_TC.dtype, columns_TC.device),
    }


def _count_tiles(tile: Tile, shape: dict[str, Any], columns_TC: torch.Tensor) -> int:
    return count_programs(tile, -(-columns_TC.shape[0] // shape["TOKEN_TILE"]), columns_TC.device)
