"""How the kernels cut up their work: sizes of tiles, warps, stages, programs.

Chosen from what the compiler reports for compute capability 9.0 (registers, spills, shared memory,
instructions) at N = 16 and 32, r = 3, D = 128, E = 192, k = 3; no device has confirmed them yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl

from sas_megatron.attention.sas.fused.padding import TILE_ROWS

# Triton's interpreter runs one program after another; a few show that they share the work.
INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True)
class Tile:
    """A kernel's launch."""

    rows: int = TILE_ROWS  # at least 64, below which the matrix units of capability 9.0 are not used
    warps: int = 8
    stages: int = 1  # tiles that are loaded ahead, and so lie in shared memory at once
    programs: int = 1  # for each multiprocessor


@dataclass(frozen=True)
class Tiling:
    """The launches of all kernels."""

    head_forward: Tile = field(default=Tile(programs=2))
    head_backward: Tile = field(default=Tile())
    head_refine_gradient: Tile = field(default=Tile())
    feature_forward: Tile = field(default=Tile())
    feature_backward: Tile = field(default=Tile())
    feature_expand_gradient: Tile = field(default=Tile(stages=2))
    feature_refine_gradient: Tile = field(default=Tile())


def compute_type(dtype: torch.dtype, device: torch.device) -> Any:
    """What operands of products are cast to: what they are, but for the interpreter, without bfloat16."""
    if device.type == "cpu":
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def count_programs(tile: Tile, num_tiles: int, device: torch.device) -> int:
    """No more than there are tiles. The same on every run, so that sums have one order."""
    most = INTERPRETED_PROGRAMS if device.type == "cpu" else tile.programs * _count_multiprocessors(device)
    return max(1, min(num_tiles, most))


@functools.lru_cache(maxsize=8)
def _count_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
