"""The .idx file of Megatron-core's indexed datasets: the positions of the documents in the .bin file.

The format is that of megatron.core.datasets.indexed_dataset (0.16 to 0.19):

    "MMIDIDX\\0\\0", version (u64), code of the token type (u8), number of sequences (u64),
    number of documents + 1 (u64), tokens of each sequence (i32), byte offset of each sequence (i64),
    index of the first sequence of each document (i64)

Each document is one sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sas_megatron.config.errors import FileProblem, translate_os_errors

INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
TokenType = Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]
TYPE_OF_CODE: dict[int, TokenType] = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_OF_DTYPE: dict[str, int] = {name: code for code, name in TYPE_OF_CODE.items()}
BLOCK_BYTES = 1 << 22
PREPARE_AGAIN = "prepare it again with `sas-megatron data prepare --overwrite`"


def count_index_bytes(num_documents: int) -> int:
    """Return the size of the .idx file of documents."""
    return INDEX_HEADER.size + 20 * num_documents + 8


def write_index(path: Path, document_tokens: npt.NDArray[np.int32], dtype: np.dtype[np.generic]) -> None:
    """Write the .idx file in blocks, so that memory does not grow with the number of documents.

    Args:
        path: The file to write.
        document_tokens: int32 [documents], number of tokens of each document.
        dtype: Data type of the tokens in the .bin file.

    Raises:
        OSError: The file cannot be written.
    """
    num_documents = len(document_tokens)
    with open(path, "wb") as stream:
        code = CODE_OF_DTYPE[dtype.name]
        stream.write(INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, num_documents, num_documents + 1))
        for block in _blocks(document_tokens):
            stream.write(block.astype("<i4").tobytes())
        begin = 0
        for block in _blocks(document_tokens):
            ends = begin + np.cumsum(block.astype(np.int64) * dtype.itemsize)
            stream.write(np.concatenate([[begin], ends[:-1]]).astype("<i8").tobytes())
            begin = int(ends[-1])
        for start in range(0, num_documents + 1, BLOCK_BYTES // 8):
            stop = min(start + BLOCK_BYTES // 8, num_documents + 1)
            stream.write(np.arange(start, stop, dtype="<i8").tobytes())


def read_lengths(path: Path, num_documents: int) -> npt.NDArray[np.int32]:
    """Return the number of tokens of each document, mapped from the file; int32 [documents].

    Raises:
        FileProblem: The file cannot be read, or is shorter.
    """
    return _map(path, "<i4", offset=INDEX_HEADER.size, count=num_documents)


def read_offsets(path: Path, num_documents: int) -> npt.NDArray[np.int64]:
    """Return the byte offset of each document in the .bin file, mapped from the file; int64 [documents].

    Raises:
        FileProblem: The file cannot be read, or is shorter.
    """
    return _map(path, "<i8", offset=INDEX_HEADER.size + 4 * num_documents, count=num_documents)


def read_header(path: Path) -> tuple[TokenType, int]:
    """Return the type of the tokens and the number of documents of an .idx file of any program.

    Raises:
        FileProblem: The file is no index, has another size than its header gives, has tokens that are not
            integers, or has several sequences per document.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    fields = INDEX_HEADER.unpack(header) if len(header) == INDEX_HEADER.size else (b"", 0, 0, 0, 0)
    if fields[:2] != (INDEX_MAGIC, INDEX_VERSION):
        raise FileProblem(path, "is not an index of token files", PREPARE_AGAIN)
    _, _, code, num_sequences, num_boundaries = fields
    if code not in TYPE_OF_CODE:
        raise FileProblem(path, f"has tokens that are not integers (type {code})", PREPARE_AGAIN)
    if num_boundaries != num_sequences + 1 or num_sequences == 0:
        raise FileProblem(
            path,
            f"has {num_sequences:,} sequences in {num_boundaries - 1:,} documents",
            "write the token files with one sequence for each document, without --split-sentences",
        )
    size_bytes, expected_bytes = path.stat().st_size, count_index_bytes(num_sequences)
    if size_bytes != expected_bytes:
        raise FileProblem(
            path, f"has {size_bytes:,} bytes, but its header gives {expected_bytes:,}", PREPARE_AGAIN
        )
    return TYPE_OF_CODE[code], num_sequences


def check_header(path: Path, *, dtype: str, num_documents: int) -> None:
    """Check the header of an .idx file.

    Raises:
        FileProblem: The file cannot be read, is no index, or is one of other tokens.
    """
    with (
        translate_os_errors(path, problem="cannot be read", remedy="check its permissions"),
        open(path, "rb") as stream,
    ):
        header = stream.read(INDEX_HEADER.size)
    fields = INDEX_HEADER.unpack(header) if len(header) == INDEX_HEADER.size else (b"", 0, 0, 0, 0)
    if fields[:2] != (INDEX_MAGIC, INDEX_VERSION):
        raise FileProblem(path, "is not an index of token files", PREPARE_AGAIN)
    expected = (CODE_OF_DTYPE[dtype], num_documents, num_documents + 1)
    if fields[2:] != expected:
        raise FileProblem(
            path,
            f"has token type, sequences, documents + 1 = {fields[2:]}, but the manifest has {expected}",
            PREPARE_AGAIN,
        )


def check_positions(path: Path, *, num_documents: int, num_tokens: int, token_bytes: int) -> None:
    """Check that the documents of an .idx file follow each other without gaps and end with the tokens.

    Megatron-core reads the tokens at these positions without checking them.

    Raises:
        FileProblem: A document is empty, or has another position; the error names the first one.
    """
    lengths, offsets = read_lengths(path, num_documents), read_offsets(path, num_documents)
    first_sequences: npt.NDArray[np.int64] = _map(
        path, "<i8", offset=INDEX_HEADER.size + 12 * num_documents, count=num_documents + 1
    )
    begin = 0
    for start in range(0, num_documents, BLOCK_BYTES // 8):
        block = slice(start, start + BLOCK_BYTES // 8)
        ends = begin + np.cumsum(lengths[block].astype(np.int64)) * token_bytes
        is_wrong = (lengths[block] < 1) | (offsets[block] != np.concatenate([[begin], ends[:-1]]))
        is_wrong |= first_sequences[block][: len(ends)] != np.arange(start, start + len(ends))
        if is_wrong.any():
            document = start + int(is_wrong.argmax())
            raise FileProblem(path, f"has a wrong position for document {document}", PREPARE_AGAIN)
        begin = int(ends[-1])
    if begin != num_tokens * token_bytes or first_sequences[-1] != num_documents:
        raise FileProblem(path, f"does not end with the {num_tokens} tokens of the .bin file", PREPARE_AGAIN)


def _map(path: Path, dtype: str, *, offset: int, count: int) -> npt.NDArray[Any]:
    with translate_os_errors(path, problem="cannot be read", remedy=PREPARE_AGAIN):
        try:
            return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
        except ValueError as error:
            raise FileProblem(path, f"is truncated ({error})", PREPARE_AGAIN) from None


def _blocks(values: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
    for start in range(0, len(values), BLOCK_BYTES // 8):
        yield values[start : start + BLOCK_BYTES // 8]
