"""Sizes of tiles, in powers of two; no torch."""

from __future__ import annotations

# Of float32 sums that one program can hold beside its tiles.
LARGEST_SUM_BYTES = 64 * 1024
# The smallest side of a product, and the rows of a tile.
SMALLEST = 16
TILE_ROWS = 128


def padded(size: int) -> int:
    """The next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def split(size: int) -> tuple[int, int]:
    """Two powers of two that hold `size` columns with less waste than one would; the second may be 0."""
    main = max(SMALLEST, 1 << (size.bit_length() - 1))
    return (main, 0) if size <= main else (main, padded(size - main))


def taps_at_once(taps: int, *, own: int, every: int) -> int:
    """Taps of a convolution [own, every, taps] whose gradients one program adds up: all, or one."""
    return taps if 4 * taps * padded(own) * padded(every) <= LARGEST_SUM_BYTES else 1
