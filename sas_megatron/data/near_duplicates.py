"""Find near-duplicate documents by MinHash (Broder 1997, "On the resemblance and containment of documents").

words -> hashes of five consecutive words -> smallest value under each of 128 hash functions: the signature
  -> documents with an equal band of the signature -> share of equal values, which estimates the Jaccard index
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SHINGLE_WORDS = 5
NUM_HASHES = 128
# Two documents with a Jaccard index s have an equal band with probability 1 − (1 − s^8)^16: 0.5 at s = 0.67.
BANDS = 16
ROWS = NUM_HASHES // BANDS
# Documents with a larger estimate are near-duplicates.
THRESHOLD = 0.7
# Hash functions that are evaluated at once, which limits the memory for a long document.
HASHES_AT_ONCE = 16

_WORD = re.compile(r"\w+")
# The stream of a bit generator is the same in all versions of numpy.
_DRAWS = np.random.Philox(0).random_raw(2 * NUM_HASHES + SHINGLE_WORDS)
_FACTORS, _OFFSETS = _DRAWS[:NUM_HASHES] | np.uint64(1), _DRAWS[NUM_HASHES : 2 * NUM_HASHES]
_WORD_FACTORS = _DRAWS[2 * NUM_HASHES :] | np.uint64(1)


class NearDuplicates:
    """The signatures of the documents that were kept so far."""

    def __init__(self) -> None:
        self._kept: list[Hashes] = []
        self._by_band: dict[tuple[int, bytes], list[int]] = {}

    def add(self, text: str) -> bool:
        """Keep a document unless it is a near-duplicate of a kept one; return whether it was kept."""
        signature = compute_signature(text)
        bands = [(band, signature[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        candidates = {index for band in bands for index in self._by_band.get(band, ())}
        if any(estimate_jaccard(signature, self._kept[index]) > THRESHOLD for index in candidates):
            return False
        for band in bands:
            self._by_band.setdefault(band, []).append(len(self._kept))
        self._kept.append(signature)
        return True


def estimate_jaccard(one: Hashes, other: Hashes) -> float:
    """Return the share of equal values of two signatures."""
    return float((one == other).mean())


def compute_signature(text: str) -> Hashes:
    """Return the `NUM_HASHES` smallest hash values of a document's shingles."""
    words = np.array([_hash_word(word) for word in _WORD.findall(text)] or [0], dtype=np.uint64)
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = np.zeros(count, dtype=np.uint64)
    for position, factor in enumerate(_WORD_FACTORS):
        part = words[position : position + count]
        shingles[: len(part)] += part * factor
    shingles ^= shingles >> np.uint64(31)
    shingles = np.unique(shingles)
    parts = []
    for start in range(0, NUM_HASHES, HASHES_AT_ONCE):
        chosen = slice(start, start + HASHES_AT_ONCE)
        values: Any = shingles[:, None] * _FACTORS[chosen] + _OFFSETS[chosen]
        parts.append((values ^ (values >> np.uint64(29))).min(axis=0))
    return np.concatenate(parts)


@functools.lru_cache(maxsize=1 << 20)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
