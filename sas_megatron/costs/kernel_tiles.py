"""Sizes of the tiles of Triton kernels, and what fits on chip. No torch.

A side of a tile is a power of two, of which a matrix product needs at least `SMALLEST_TILE_SIDE`.
"""

from __future__ import annotations

# Shared memory that a program may use on a multiprocessor of compute capability 9.0 (H100, H200 data sheet).
SHARED_MEMORY_BYTES = 227 * 1024
# Largest partial sum, in float32, that one program of a fused kernel can accumulate next to its tiles.
LARGEST_SUM_BYTES = 64 * 1024
# Smallest side of a matrix product in Triton.
SMALLEST_TILE_SIDE = 16
# Default rows of a tile of the fused kernels.
TILE_ROWS = 128


def padded_size(size: int) -> int:
    """Return the side of a tile for `size` elements: the next power of two, at least `SMALLEST_TILE_SIDE`."""
    return max(SMALLEST_TILE_SIDE, 1 << (size - 1).bit_length())


def split_size(size: int) -> tuple[int, int]:
    """Return two powers of two that cover `size` columns with less padding than one; the second may be 0."""
    main = max(SMALLEST_TILE_SIDE, 1 << (size.bit_length() - 1))
    return (main, 0) if size <= main else (main, padded_size(size - main))


def taps_at_once(taps: int, *, num_outputs: int, num_inputs: int) -> int:
    """Return the number of taps whose gradients one program accumulates: all taps if they fit, otherwise one.

    Args:
        taps: Taps of the second convolution.
        num_outputs: Its local output heads.
        num_inputs: Its input heads, which are all simulated heads.
    """
    return taps if 4 * taps * padded_size(num_outputs) * padded_size(num_inputs) <= LARGEST_SUM_BYTES else 1
