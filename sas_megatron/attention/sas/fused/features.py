"""The fused feature simulation with rotary embeddings: heads [rows, D] -> [rows, E].

    forward    one kernel; saves its input, or the tensors from which its input can be recomputed
    backward   one kernel for the gradients of the heads and of y = x·A1ᵀ + a1, and one kernel each for the
               gradients of A1 and A2. Each program stores a partial sum, and these are added in a fixed order

With rotary embeddings, the results are in pair order (`feature_kernels`). Scores do not depend on the order.

This module also defines the launch parameters of all fused kernels (`Tiling`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl

from sas_megatron.attention.sas.fused import feature_kernels
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights
from sas_megatron.costs.kernel_tiles import TILE_ROWS, padded_size, split_size

# Triton's interpreter runs programs one after another; a few are enough to test that they share the work.
INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one kernel."""

    rows: int = TILE_ROWS  # below 64, the matrix units of compute capability 9.0 are not used
    warps: int = 8
    stages: int = 1  # tiles that are loaded ahead, and are in shared memory at the same time
    programs: int = 1  # per multiprocessor


@dataclass(frozen=True)
class Tiling:
    """Launch parameters of all kernels, of the head simulation and of the feature simulation.

    The defaults follow from the compiler's report for compute capability 9.0 (registers, spills, shared
    memory, instructions) at N = 16 and 32, r = 3, D = 128, E = 192, k = 3. No device has confirmed them yet.
    """

    head_forward: Tile = field(default=Tile(programs=2))
    head_backward: Tile = field(default=Tile())
    head_refine_gradient: Tile = field(default=Tile())
    feature_forward: Tile = field(default=Tile())
    feature_backward: Tile = field(default=Tile())
    feature_expand_gradient: Tile = field(default=Tile(stages=2))
    feature_refine_gradient: Tile = field(default=Tile())


class Recomputation(NamedTuple):
    """A function that recomputes the heads in the backward pass, and the tensors to save for it."""

    compute: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...]


def pair_order(num_features: int, rotary_dim: int) -> torch.Tensor:
    """Return the feature of each column, if the first `rotary_dim` features have rotary embeddings."""
    column = torch.arange(num_features)
    return torch.where(column < rotary_dim, column // 2 + column % 2 * (rotary_dim // 2), column)


def compute_type(dtype: torch.dtype, device: torch.device) -> Any:
    """Return the Triton dtype of product operands: the tensors' dtype, or float32 in the interpreter.

    The interpreter has no bfloat16.
    """
    if device.type == "cpu":
        return tl.float32
    dtypes = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
    return dtypes[str(dtype).removeprefix("torch.")]


def count_programs(tile: Tile, num_tiles: int, device: torch.device) -> int:
    """Return the number of programs of a launch, at most one per tile.

    It is the same in every run on a device, so that sums are added in the same order.
    """
    limit = INTERPRETED_PROGRAMS if device.type == "cpu" else tile.programs * _count_multiprocessors(device)
    return max(1, min(num_tiles, limit))


@functools.lru_cache(maxsize=8)
def _count_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=4)
def build_rope_table(angles: torch.Tensor) -> torch.Tensor:
    """Return the rope table [S, R], cosine and sine of each pair, of Megatron-core's angles [S, 1, 1, R]."""
    half = angles.flatten(1)[:, : angles.shape[-1] // 2].float()
    return torch.stack([half.cos(), half.sin()], dim=-1).flatten(1)


def simulate_features(
    heads_TMD: torch.Tensor,
    weights: ResidualMapWeights,
    *,
    rope_table: torch.Tensor | None,
    tiling: Tiling,
    recomputation: Recomputation | None = None,
) -> torch.Tensor:
    """Compute the feature simulation, [T, M, D] -> [T, M, E], contiguous.

    Args:
        heads_TMD: Heads of T = S·B tokens; the B tokens of a position are contiguous.
        weights: expand [E, D], refine [E, E], biases [E] or None.
        rope_table: Cosines and sines of S positions, by `build_rope_table`; None: no rotary embeddings, and
            the features keep their order.
        tiling: Launch parameters of the kernels.
        recomputation: Recomputes `heads_TMD` in the backward pass; None: the heads are saved.
    """
    simulated: torch.Tensor = _FeatureSimulation.apply(heads_TMD, rope_table, tiling, recomputation, *weights)
    return simulated


class _FeatureSimulation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads_TMD: torch.Tensor,
        rope_table: torch.Tensor | None,
        tiling: Tiling,
        recomputation: Recomputation | None,
        *weights: torch.Tensor | None,
    ) -> torch.Tensor:
        heads = heads_TMD.contiguous()
        recomputation = recomputation or Recomputation(lambda saved: saved, (heads,))
        ctx.tiling, ctx.compute = tiling, recomputation.compute
        # Detached, since autograd does not know these tensors as inputs of this function.
        sources = [None if source is None else source.detach() for source in recomputation.tensors]
        ctx.save_for_backward(rope_table, *weights, *sources)
        simulated = heads.new_empty(*heads.shape[:2], weights[0].shape[0])  # type: ignore[union-attr]
        launcher = _Launcher(heads, ResidualMapWeights(*weights), rope_table)  # type: ignore[arg-type]
        launcher.launch(
            feature_kernels.feature_forward,
            tiling.feature_forward,
            launcher.heads,
            *launcher.weights,
            launcher.rope_table,
            simulated,
        )
        return simulated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        rope_table, expand, refine, expand_bias, refine_bias, *sources = ctx.saved_tensors
        weights = ResidualMapWeights(expand, refine, expand_bias, refine_bias)
        launcher = _Launcher(ctx.compute(*sources), weights, rope_table)
        tiling: Tiling = ctx.tiling
        gradient = gradient.contiguous()
        head_gradient, expanded_gradient = torch.empty_like(launcher.heads), torch.empty_like(gradient)
        launcher.launch(
            feature_kernels.feature_backward,
            tiling.feature_backward,
            launcher.heads,
            *launcher.weights[:3],
            launcher.rope_table,
            gradient,
            head_gradient,
            expanded_gradient,
        )
        expand_partials = launcher.partial_sums(tiling.feature_expand_gradient, expand, expand_bias)
        launcher.launch(
            feature_kernels.expand_gradient,
            tiling.feature_expand_gradient,
            launcher.heads,
            expanded_gradient,
            *expand_partials,
        )
        refine_partials = launcher.partial_sums(tiling.feature_refine_gradient, refine, refine_bias)
        launcher.launch(
            feature_kernels.refine_gradient,
            tiling.feature_refine_gradient,
            launcher.heads,
            *launcher.weights[:2],
            launcher.rope_table,
            gradient,
            *refine_partials,
        )
        return (
            head_gradient,
            None,
            None,
            None,
            expand_partials[0].sum(0).to(expand.dtype),
            refine_partials[0].sum(0).to(refine.dtype),
            None if expand_bias is None else expand_partials[1].sum(0).to(expand_bias.dtype),
            None if refine_bias is None else refine_partials[1].sum(0).to(refine_bias.dtype),
        )


class _Launcher:
    """Launches feature kernels on the rows of heads, with the constants that the kernels are compiled for."""

    def __init__(
        self, heads: torch.Tensor, weights: ResidualMapWeights, rope_table: torch.Tensor | None
    ) -> None:
        self.heads = heads
        tokens, heads_per_token, head_dim = heads.shape
        num_features = weights.expand.shape[0]
        self.num_rows = tokens * heads_per_token
        # Without biases or rotary embeddings, kernels get a weight as the pointer, and do not read it.
        self.rope_table = weights.expand if rope_table is None else rope_table
        self.weights = (
            weights.expand,
            weights.expand if weights.expand_bias is None else weights.expand_bias,
            weights.refine,
            weights.refine if weights.refine_bias is None else weights.refine_bias,
        )
        main, rest = split_size(num_features)
        self.constants = {
            "NARROW": head_dim,
            "WIDE": num_features,
            "ROTARY": 0 if rope_table is None else rope_table.shape[1],
            "ROWS_PER_POSITION": 1 if rope_table is None else self.num_rows // rope_table.shape[0],
            "HAS_BIAS": weights.expand_bias is not None,
            "NARROW_TILE": padded_size(head_dim),
            "MAIN": main,
            "REST": rest,
            "COMPUTE": compute_type(heads.dtype, heads.device),
        }

    def count_programs(self, tile: Tile) -> int:
        """Return the number of programs of a launch."""
        return count_programs(tile, -(-self.num_rows // tile.rows), self.heads.device)

    def partial_sums(
        self, tile: Tile, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate the partial sums, one per program, of the gradients of a weight and a bias."""
        programs = self.count_programs(tile)
        options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
        sums = torch.empty(programs, *weight.shape, **options)
        return sums, sums if bias is None else torch.empty(programs, *bias.shape, **options)

    def launch(self, kernel: Any, tile: Tile, *tensors: torch.Tensor) -> None:
        """Launch one of `feature_kernels`."""
        constants = {name: value for name, value in self.constants.items() if name in kernel.arg_names}
        kernel[(self.count_programs(tile),)](
            *tensors,
            self.num_rows,
            **constants,
            ROWS=tile.rows,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
