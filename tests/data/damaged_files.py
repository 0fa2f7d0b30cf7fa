"""Small Arrow and Parquet files with one damaged place, which a child process reads.

    python -m tests.data.damaged_files arrow 19

damages every 19th byte and prints one line of JSON: the number of files that were read, of user errors, and
all other exceptions. If reading ends the process, it ends without a line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from sas_megatron.config.errors import UserError
from sas_megatron.data.documents import stream_documents

TEXTS = ["one", None, "é", "", "word " * 9]


def text_columns() -> dict[str, pa.Array]:
    """Return a column of every type that holds text."""
    texts = pa.array(TEXTS)
    types = (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return {
        "string": texts,
        **{str(text_type): texts.cast(text_type) for text_type in types},
        "dictionary": texts.dictionary_encode(),
        "struct": pa.array([None if text is None else {"text": text} for text in TEXTS]),
    }


def write_table(columns: Mapping[str, Any] | pa.Table) -> bytes:
    """Return a stream of Arrow batches."""
    table = pa.table(columns) if isinstance(columns, Mapping) else columns
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def write_arrow(column: pa.Array, *, stream: bool) -> bytes:
    """Return a file or stream with one column."""
    table = pa.table({"text": column})
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


def write_parquet(column: pa.Array) -> bytes:
    """Return a Parquet file with one column; pyarrow 26 aborts if some of its size statistics are damaged."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": column}), sink, compression="none", store_schema=False)
    return sink.getvalue().to_pybytes()


def damage(data: bytes, *, stride: int) -> Iterator[bytes]:
    """Yield copies with another value in one byte, for every `stride`-th byte."""
    for index in range(0, len(data), stride):
        for changed in (data[index] ^ 1, data[index] ^ 0x30, 0xFF):
            yield data[:index] + bytes([changed]) + data[index + 1 :]
    # Offsets and lengths are little-endian and aligned.
    for index in range(0, len(data) - 4, 4 * stride):
        for value in (-1, 1 << 30):
            yield data[:index] + value.to_bytes(4, "little", signed=True) + data[index + 4 :]


def read_damaged(kind: str, *, stride: int) -> dict[str, Any]:
    """Read damaged files of a format and count the results."""
    counts: dict[str, Any] = {"read": 0, "refused": 0, "others": []}
    path = Path(tempfile.mkdtemp()) / f"a.{kind}"
    for name, column in text_columns().items():
        if kind == "parquet":
            undamaged = [write_parquet(column)]
        else:
            undamaged = [write_arrow(column, stream=stream) for stream in (False, True)]
        for data in undamaged:
            for damaged in damage(data, stride=stride):
                path.write_bytes(damaged)
                try:
                    list(stream_documents([path], text_column="text.text" if name == "struct" else "text"))
                    counts["read"] += 1
                except UserError:
                    counts["refused"] += 1
                except Exception as error:  # reported by the parent
                    counts["others"].append(f"{name}: {error!r}")
    return counts


if __name__ == "__main__":
    print(json.dumps(read_damaged(sys.argv[1], stride=int(sys.argv[2]))))
