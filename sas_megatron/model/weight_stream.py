"""Random numbers of one parameter by position, so that a rank draws its shard without the rest.

    (seed, global name) -> key ┐
    position // 8 -> counter  ─┴─> Philox 4×64 ─> 4 words of 64 bits ─> 8 numbers, at 8 positions

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") encrypts a counter, so the words of
any counter cost the same, and parameters with different keys have independent words. A position is the index
in the flattened full parameter. The number at a position depends on nothing else: neither on the layout, nor
on rows that pad the vocabulary at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_NUMBERS_PER_COUNTER, _WORDS_PER_COUNTER = 8, 4
# Numbers drawn at once; their intermediate results fit into the second-level cache of a processor.
_BLOCK = 2**15
# NumPy may compute the remainder of an array after its last full vector register by another algorithm, with
# other rounding. Arrays of a multiple of 64 words have no remainder.
_WORD_MULTIPLE = 64

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.float32]


class WeightStream:
    """The random numbers of the parameter `name`, by the run's seed and the parameter's global name."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        # The counter whose words `self._philox` returns next.
        self._counter = 0

    def words(self, counter: int, num_counters: int) -> Words:
        """Return the words of consecutive counters, [4·num_counters]."""
        self._philox.advance(counter - self._counter)
        self._counter = counter + num_counters
        return self._philox.random_raw(num_counters * _WORDS_PER_COUNTER)

    @torch.no_grad()
    def fill(
        self, out: torch.Tensor, distribution: str, scale: float, *, starts: Sequence[int] = (0,)
    ) -> None:
        """Draw numbers in float32 into a tensor of any dtype and device.

        Args:
            out: The tensor, contiguous. In row-major order it consists of runs of equal length.
            distribution: `normal`, N(0, scale), or `uniform`, in ±scale.
            scale: The standard deviation, or the bound.
            starts: The position of the first number of each run.
        """
        runs = out.view(len(starts), -1)
        length = runs.shape[1]
        runs_at_once = max(1, _BLOCK // max(1, length))
        for first in range(0, len(starts), runs_at_once):
            some_starts = starts[first : first + runs_at_once]
            for begin in range(0, length, _BLOCK):
                block = runs[first : first + runs_at_once, begin : begin + _BLOCK]
                positions = [start + begin for start in some_starts]
                numbers = self._draw(positions, block.shape[1], distribution) * np.float32(scale)
                block.copy_(torch.from_numpy(numbers))

    def _draw(self, starts: Sequence[int], length: int, distribution: str) -> Numbers:
        """Return the numbers of runs, [runs, length], with scale 1."""
        offsets = [start % _NUMBERS_PER_COUNTER for start in starts]
        num_counters = -(-(max(offsets) + length) // _NUMBERS_PER_COUNTER)
        num_words = len(starts) * num_counters * _WORDS_PER_COUNTER
        words = np.zeros(num_words + -num_words % _WORD_MULTIPLE, np.uint64)
        by_run = words[:num_words].reshape(len(starts), -1)
        for row, start in zip(by_run, starts, strict=True):
            row[:] = self.words(start // _NUMBERS_PER_COUNTER, num_counters)
        numbers = _NUMBERS_OF[distribution](words)[: 2 * num_words].reshape(len(starts), -1)
        drawn = [row[offset : offset + length] for row, offset in zip(numbers, offsets, strict=True)]
        return np.stack(drawn)


def _to_normal(words: Words) -> Numbers:
    """Return two numbers from N(0, 1) for each word (Box and Muller 1958).

    The low half u gives the radius √(-2·ln((u + ½)/2³²)), at most 6.8, and the high half the angle.
    """
    halves = words.view(np.uint32).reshape(-1, 2)
    radii = halves[:, 0].astype(np.float32)
    radii += 0.5
    radii *= 2.0**-32
    np.log(radii, out=radii)
    radii *= -2.0
    np.sqrt(radii, out=radii)
    angles = halves.view(np.int32)[:, 1].astype(np.float32)
    angles *= math.pi / 2**31
    normal = np.empty(halves.shape, np.float32)
    np.multiply(radii, np.cos(angles), out=normal[:, 0])
    np.multiply(radii, np.sin(angles), out=normal[:, 1])
    return normal.reshape(-1)


def _to_uniform(words: Words) -> Numbers:
    """Return two numbers from the uniform distribution in ±1 for each word, the low half's first."""
    return words.view(np.int32).astype(np.float32) * np.float32(2.0**-31)


_NUMBERS_OF: dict[str, Any] = {"normal": _to_normal, "uniform": _to_uniform}
