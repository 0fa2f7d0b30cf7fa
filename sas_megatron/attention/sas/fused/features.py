"""The fused feature simulation: heads [rows, D] -> [rows, E], rotary positions included.

    forward    one kernel; keeps its input, or what its input can be computed from
    backward   one kernel for the gradients of heads and of y = x·A1ᵀ + a1, one each for those of the weights,
               as sums a program that are added up in one order

With rotary positions, features come in pair order (`feature_kernels`), which scores do not notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sas_megatron.attention.sas.fused import feature_kernels
from sas_megatron.attention.sas.fused.padding import padded, split
from sas_megatron.attention.sas.fused.tiling import Tile, Tiling, compute_type, count_programs
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights


class Recomputation(NamedTuple):
    """How the backward pass gets the heads again, in place of keeping them."""

    compute: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...]


def pair_order(wide: int, rotary: int) -> torch.Tensor:
    """The feature that lies in each of `wide` columns where `rotary` features turn."""
    column = torch.arange(wide)
    return torch.where(column < rotary, column // 2 + column % 2 * (rotary // 2), column)


@functools.lru_cache(maxsize=4)
def turns_of(angles: torch.Tensor) -> torch.Tensor:
    """[S, 1, 1, R], as Megatron-core hands them to its layers -> [S, R], cosine and sine of each pair."""
    half = angles.flatten(1)[:, : angles.shape[-1] // 2].float()
    return torch.stack([half.cos(), half.sin()], dim=-1).flatten(1)


def simulate_features(
    heads_TMD: torch.Tensor,
    weights: ResidualMapWeights,
    *,
    turns: torch.Tensor | None,
    tiling: Tiling,
    recomputation: Recomputation | None = None,
) -> torch.Tensor:
    """[T, m, D] -> [T, m, E], contiguous.

    Args:
        heads_TMD: Of T = S·B tokens, those of one position side by side.
        weights: expand [E, D], refine [E, E], biases [E] or None.
        turns: By `turns_of` S positions; None: nothing turns, and features keep their order.
        tiling: The kernels' launches.
        recomputation: Computes `heads_TMD` again; None: they are kept.
    """
    simulated: torch.Tensor = _FeatureSimulation.apply(heads_TMD, turns, tiling, recomputation, *weights)
    return simulated


class _FeatureSimulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads_TMD: torch.Tensor,
        turns: torch.Tensor | None,
        tiling: Tiling,
        recomputation: Recomputation | None,
        *weights: torch.Tensor | None,
    ) -> torch.Tensor:
        heads = heads_TMD.contiguous()
        recomputation = recomputation or Recomputation(lambda kept: kept, (heads,))
        ctx.tiling, ctx.compute = tiling, recomputation.compute
        # Detached: they are given once more than autograd knows of.
        sources = [None if source is None else source.detach() for source in recomputation.tensors]
        ctx.save_for_backward(turns, *weights, *sources)
        simulated = heads.new_empty(*heads.shape[:2], weights[0].shape[0])  # type: ignore[union-attr]
        rows = _Rows(heads, ResidualMapWeights(*weights), turns)  # type: ignore[arg-type]
        rows.launch(
            feature_kernels.feature_forward,
            tiling.feature_forward,
            rows.heads,
            *rows.matrices,
            rows.table,
            simulated,
        )
        return simulated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        turns, expand, refine, expand_bias, refine_bias, *sources = ctx.saved_tensors
        weights = ResidualMapWeights(expand, refine, expand_bias, refine_bias)
        rows = _Rows(ctx.compute(*sources), weights, turns)
        tiling: Tiling = ctx.tiling
        gradient = gradient.contiguous()
        head_gradient, expanded_gradient = torch.empty_like(rows.heads), torch.empty_like(gradient)
        matrix, bias, matrix_2 = rows.matrices[:3]
        rows.launch(
            feature_kernels.feature_backward,
            tiling.feature_backward,
            rows.heads,
            matrix,
            bias,
            matrix_2,
            rows.table,
            gradient,
            head_gradient,
            expanded_gradient,
        )
        expand_sums = rows.sums(tiling.feature_expand_gradient, expand, expand_bias)
        rows.launch(
            feature_kernels.expand_gradient,
            tiling.feature_expand_gradient,
            rows.heads,
            expanded_gradient,
            *expand_sums,
        )
        refine_sums = rows.sums(tiling.feature_refine_gradient, refine, refine_bias)
        rows.launch(
            feature_kernels.refine_gradient,
            tiling.feature_refine_gradient,
            rows.heads,
            matrix,
            bias,
            rows.table,
            gradient,
            *refine_sums,
        )
        return (
            head_gradient,
            None,
            None,
            None,
            expand_sums[0].sum(0).to(expand.dtype),
            refine_sums[0].sum(0).to(refine.dtype),
            None if expand_bias is None else expand_sums[1].sum(0).to(expand_bias.dtype),
            None if refine_bias is None else refine_sums[1].sum(0).to(refine_bias.dtype),
        )


class _Rows:
    """Heads as rows, with what every kernel is told of them and of the weights."""

    def __init__(self, heads: torch.Tensor, weights: ResidualMapWeights, turns: torch.Tensor | None) -> None:
        self.heads = heads
        tokens, per_token, narrow = heads.shape
        wide = weights.expand.shape[0]
        self.num_rows = tokens * per_token
        # Pointers that no kernel reads where there is no bias, or nothing turns.
        self.table = weights.expand if turns is None else turns
        self.matrices = (
            weights.expand,
            weights.expand if weights.expand_bias is None else weights.expand_bias,
            weights.refine,
            weights.refine if weights.refine_bias is None else weights.refine_bias,
        )
        main, rest = split(wide)
        self.shape = {
            "NARROW": narrow,
            "WIDE": wide,
            "ROTARY": 0 if turns is None else turns.shape[1],
            "ROWS_PER_POSITION": 1 if turns is None else self.num_rows // turns.shape[0],
            "HAS_BIAS": weights.expand_bias is not None,
            "NARROW_TILE": padded(narrow),
            "MAIN": main,
            "REST": rest,
            "COMPUTE": compute_type(heads.dtype, heads.device),
        }

    def programs(self, tile: Tile) -> int:
        """Of a launch."""
        return count_programs(tile, -(-self.num_rows // tile.rows), self.heads.device)

    def sums(
        self, tile: Tile, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For a launch's sums of the gradients of a matrix and a bias."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": matrix.device}
        totals = torch.empty(self.programs(tile), *matrix.shape, **options)
        return totals, totals if bias is None else torch.empty(self.programs(tile), *bias.shape, **options)

    def launch(self, kernel: Any, tile: Tile, *tensors: torch.Tensor) -> None:
        """One of `feature_kernels`."""
        shape = {name: value for name, value in self.shape.items() if name in kernel.arg_names}
        kernel[(self.programs(tile),)](
            *tensors, self.num_rows, **shape, ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages
        )
