"""Other tiles for the fused kernels, one kernel at a time: what a GPU makes of each."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sas_megatron.attention.sas.fused.padding import padded
from sas_megatron.attention.sas.fused.tiling import Tile, Tiling
from sas_megatron.attention.sas.simulation_kernels import FusedKernels
from sas_megatron.benchmarks.block_shape import BlockShape
from sas_megatron.benchmarks.simulation import SimulationCase
from sas_megatron.benchmarks.timing import time_in_turn

PASS_OF_KERNEL = {
    field.name: "forward" if "forward" in field.name else "backward" for field in dataclasses.fields(Tiling)
}


def candidate_tiles() -> Iterator[Tile]:
    """Around what the compiler's report suggests; eight to compile for each kernel, some seconds each."""
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
    """For each kernel and tile the median seconds of the whole pass, the other kernels as they are.

    A tile that does not fit on chip, or that the compiler refuses, has no seconds, and the reason.
    """
    case = SimulationCase(shape, device=device, dtype=dtype)
    fused = FusedKernels(case.attention)
    usual = fused.tiling
    results: list[dict[str, Any]] = []
    for kernel in kernels:
        name = PASS_OF_KERNEL[kernel]
        for tile in tiles or unlike_tiles(kernel, shape, [getattr(usual, kernel), *candidate_tiles()]):
            fused.tiling = dataclasses.replace(usual, **{kernel: tile})
            result: dict[str, Any] = {"kernel": kernel, **dataclasses.asdict(tile)}
            try:
                prepare = case.passes(fused)[name]
                seconds = time_in_turn({name: prepare}, device=device, rounds=repeats)[name]
                results.append({**result, "seconds": statistics.median(seconds)})
            # Triton has a class of its own for each resource, stage and version. One tile is no reason to
            # lose the others' seconds.
            except Exception as error:
                results.append({**result, "seconds": None, "problem": f"{type(error).__name__}: {error}"})
    return results


def unlike_tiles(kernel: str, shape: BlockShape, tiles: Sequence[Tile]) -> list[Tile]:
    """Without those that cut up the work as one before does: a tile of heads holds whole tokens."""
    least = padded(shape.head_dim) if kernel.startswith("head") else 1
    return list(dict.fromkeys(dataclasses.replace(tile, rows=max(tile.rows, least)) for tile in tiles))
