"""Token files as other programs write them, without this package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

INDEX_HEADER = struct.Struct("<9sQBQQ")
CODES = {"uint16": 8, "int32": 4, "int64": 5}


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> Path:
    """Write token files as Megatron-LM's tools/preprocess_data.py does, each document as one sequence."""
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    tokens = np.concatenate([np.array(document, dtype=dtype) for document in documents])
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * tokens.itemsize
    header = INDEX_HEADER.pack(b"MMIDIDX\0\0", 1, CODES[dtype], len(documents), len(documents) + 1)
    boundaries = np.arange(len(documents) + 1, dtype=np.int64)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())
    return prefix
