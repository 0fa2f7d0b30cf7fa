"""Time the fused kernels with other tiles on a GPU, one kernel at a time."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sas_megatron.attention.sas.fused.features import Tile, Tiling
from sas_megatron.attention.sas.simulation_kernels import FusedKernels
from sas_megatron.benchmarks.attention_blocks import BlockShape
from sas_megatron.benchmarks.simulation import SimulationCase
from sas_megatron.benchmarks.timing import time_alternately
from sas_megatron.costs.kernel_tiles import padded_size

PASS_OF_KERNEL = {
    field.name: "forward" if "forward" in field.name else "backward" for field in dataclasses.fields(Tiling)
}


def candidate_tiles() -> Iterator[Tile]:
    """Yield the tiles around the choice that follows from the compiler's report.

    Each kernel is compiled for each tile, which takes some seconds.
    """
    for rows, warps, stages, programs in itertools.product((64, 128), (4, 8), (1, 2), (1, 2)):
        yield Tile(rows=rows, warps=warps, stages=stages, programs=programs)


def sweep_tiles(
    shape: BlockShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    kernels: Sequence[str] = tuple(PASS_OF_KERNEL),
    tiles: Sequence[Tile] | None = None,
) -> list[dict[str, Any]]:
    """Time the complete pass for each kernel and tile, while the other kernels keep their default tile.

    Args:
        shape: Sizes of the block.
        device: A GPU.
        dtype: Dtype of weights and activations.
        repeats: Number of rounds after the warm-up rounds.
        kernels: Names of the kernels: fields of `Tiling`.
        tiles: Tiles for each kernel; None: the default tile and the candidates.

    Returns:
        For each kernel and tile the median seconds of the pass. If the tile does not fit on chip or the
        compiler fails, `seconds` is None and `problem` is the reason.
    """
    case = SimulationCase(shape, device=device, dtype=dtype)
    fused = FusedKernels(case.attention)
    default = fused.tiling
    results: list[dict[str, Any]] = []
    for kernel in kernels:
        name = PASS_OF_KERNEL[kernel]
        for tile in tiles or distinct_tiles(kernel, shape, [getattr(default, kernel), *candidate_tiles()]):
            fused.tiling = dataclasses.replace(default, **{kernel: tile})
            result: dict[str, Any] = {"kernel": kernel, **dataclasses.asdict(tile)}
            try:
                prepare = case.passes(fused)[name]
                seconds = time_alternately({name: prepare}, device=device, rounds=repeats)[name]
                results.append({**result, "seconds": statistics.median(seconds)})
            # Triton raises many types of errors, by resource, compiler stage and version. An error with one
            # tile must not discard the times of the others.
            except Exception as error:
                results.append({**result, "seconds": None, "problem": f"{type(error).__name__}: {error}"})
    return results


def distinct_tiles(kernel: str, shape: BlockShape, tiles: Sequence[Tile]) -> list[Tile]:
    """Drop tiles that divide the work like an earlier tile; a head tile has at least one full token."""
    least = padded_size(shape.head_dim) if kernel.startswith("head") else 1
    return list(dict.fromkeys(dataclasses.replace(tile, rows=max(tile.rows, least)) for tile in tiles))
