"""Sizes of tiles, and the launch parameters of the kernels: warps, stages and programs. No torch at import.

The defaults follow from the compiler's report for compute capability 9.0 (registers, spills, shared memory,
instructions) at N = 16 and 32, r = 3, D = 128, E = 192, k = 3. No device has confirmed them yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Largest partial sum, in float32, that one program can accumulate next to its tiles.
LARGEST_SUM_BYTES = 64 * 1024
# Smallest side of a matrix product.
SMALLEST = 16
# Default rows of a tile.
TILE_ROWS = 128
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
    """Launch parameters of all kernels."""

    head_forward: Tile = field(default=Tile(programs=2))
    head_backward: Tile = field(default=Tile())
    head_refine_gradient: Tile = field(default=Tile())
    feature_forward: Tile = field(default=Tile())
    feature_backward: Tile = field(default=Tile())
    feature_expand_gradient: Tile = field(default=Tile(stages=2))
    feature_refine_gradient: Tile = field(default=Tile())


def padded(size: int) -> int:
    """Return the next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def split(size: int) -> tuple[int, int]:
    """Return two powers of two that cover `size` columns with less padding than one; the second may be 0."""
    main = max(SMALLEST, 1 << (size.bit_length() - 1))
    return (main, 0) if size <= main else (main, padded(size - main))


def taps_at_once(taps: int, *, own: int, every: int) -> int:
    """Return the number of taps whose gradients one program accumulates: all taps if they fit, otherwise one.

    Args:
        taps: Taps of the second convolution.
        own: Its local output heads.
        every: Its input heads, all simulated heads.
    """
    return taps if 4 * taps * padded(own) * padded(every) <= LARGEST_SUM_BYTES else 1


def compute_type(dtype: torch.dtype, device: torch.device) -> Any:
    """Return the Triton dtype of product operands: the tensors' dtype, or float32 in the interpreter.

    The interpreter has no bfloat16.
    """
    import triton.language as tl

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
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)
