"""Megatron-core's indexed datasets, PREFIX.bin and PREFIX.idx, and our record of them, PREFIX.json.

Read and written here with numpy alone, so that looking at them needs neither torch nor Megatron-core.
The layout is that of megatron.core.datasets.indexed_dataset (0.16 to 0.19):

    .bin   the tokens of all documents one after the other
    .idx   "MMIDIDX\\0\\0", version (u64), type of token (u8), sequences (u64), documents + 1 (u64),
           tokens of each sequence (i32), byte at which it begins (i64), first sequence of each document (i64)

Here each document is one sequence.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.data.tokenizer import Tokenizer

SCHEMA_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
CODE_OF_DTYPE = {"int32": 4, "uint16": 8}
BLOCK_BYTES = 1 << 22
PREPARE_AGAIN = "prepare it again with `sas-megatron data prepare --overwrite`"


# Up to this many bytes, a second or so, token files are read whole before a run; beyond it their
# sizes, headers and records are compared (`sas-megatron data inspect --verify` reads them whole).
VERIFIED_WHOLE_BYTES = 2**30


class SourceRecord(BaseModel):
    """A file or folder that was named, as it was then."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    num_files: int
    size_bytes: int


class TokenManifest(BaseModel):
    """What PREFIX.bin and PREFIX.idx hold and what they were made of; kept as PREFIX.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    num_documents: int
    num_tokens: int  # with one end of document each
    text_bytes: int
    empty_documents: int  # left out
    dtype: Literal["uint16", "int32"]
    vocab_size: int
    eos_id: int
    max_token_id: int
    tokenizer_path: str
    tokenizer_sha256: str
    text_column: str
    sources: list[SourceRecord]
    sources_fingerprint: str  # path, size and time of change of each file
    text_sha256: str  # over the sha256 of each chunk of text as read
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    created: str
    package_version: str


def token_file(prefix: str | Path, ending: str) -> Path:
    """The file of a prefix: `.bin`, `.idx` or `.json`. A prefix may have dots in its name."""
    return Path(f"{prefix}{ending}")


def load_manifest(prefix: str | Path) -> TokenManifest:
    """The record of token files.

    Raises:
        FileProblem: it is missing, unreadable, or of another version.
    """
    path = token_file(prefix, ".json")
    with translate_os_errors(
        path,
        problem="cannot be read",
        remedy=PREPARE_AGAIN,
        missing=(
            f"there is no record of token files {prefix}",
            "prepare them with `sas-megatron data prepare`",
        ),
    ):
        content = path.read_bytes()
    try:
        manifest = TokenManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise FileProblem(
            path, f"is not a record of token files ({where}: {first['msg']})", PREPARE_AGAIN
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise FileProblem(
            path,
            f"has schema version {manifest.schema_version}, this program reads {SCHEMA_VERSION}",
            PREPARE_AGAIN,
        )
    return manifest


def verify_token_files(
    prefix: str | Path, vocab_size: int | None = None, *, full: bool = False
) -> TokenManifest:
    """Checks token files against their record, each other and a vocabulary; returns the record.

    Sizes and headers always; with `full`, also every byte (sha256) and every token id.

    Raises:
        FileProblem: a file is missing, damaged or truncated, or holds a token beyond the vocabulary.
    """
    manifest = load_manifest(prefix)
    bin_path, idx_path = token_file(prefix, ".bin"), token_file(prefix, ".idx")
    _check_size(bin_path, manifest.bin_bytes)
    _check_size(idx_path, manifest.idx_bytes)
    _check_index(idx_path, manifest)
    expected_bytes = manifest.num_tokens * np.dtype(manifest.dtype).itemsize
    if manifest.bin_bytes != expected_bytes:
        raise FileProblem(
            bin_path,
            f"has {manifest.bin_bytes} bytes where {manifest.num_tokens} tokens take {expected_bytes}",
            PREPARE_AGAIN,
        )
    max_token_id = manifest.max_token_id
    if full:
        for path, sha256 in ((bin_path, manifest.bin_sha256), (idx_path, manifest.idx_sha256)):
            if hash_file(path) != sha256:
                raise FileProblem(path, "differs from what was written (sha256)", PREPARE_AGAIN)
        max_token_id = max((int(block.max()) for block in _token_blocks(bin_path, manifest)), default=-1)
    limit = manifest.vocab_size if vocab_size is None else vocab_size
    if max_token_id >= limit:
        raise FileProblem(
            bin_path,
            f"holds token id {max_token_id}, beyond the vocabulary of {limit}",
            "use the tokenizer that wrote it, or prepare the data with yours",
        )
    return manifest


def open_token_files(data: DataConfig, *, vocab_size: int, verify: bool = False) -> Tokenizer:
    """Checks the token files and their tokenizer against each other and the model, and opens the latter.

    Args:
        data: Names the files.
        vocab_size: Rows of the model's embedding that stand for tokens.
        verify: Read files of up to `VERIFIED_WHOLE_BYTES` whole, for damage and tokens beyond the vocabulary.

    Raises:
        FieldError: the tokenizer is another than the one that wrote a token file, or larger than the model;
            or a file is shorter than one sample.
        FileProblem: a file is missing, damaged or holds a token the model has no row for.
    """
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise FieldError(
            "model.vocab_size",
            vocab_size,
            f"is less than the {tokenizer.vocab_size} pieces of {data.tokenizer}",
            f"use {tokenizer.vocab_size}",
        )
    for prefix in data.prefixes:
        manifest = load_manifest(prefix)
        # Megatron-core would look for a sample's tokens in it for ever.
        if manifest.num_tokens <= data.sequence_length:
            raise FieldError(
                "data.sequence_length",
                data.sequence_length,
                f"must be less than the {manifest.num_tokens} tokens of {prefix}",
                "prepare more documents, or use a shorter one",
            )
        verify_token_files(prefix, vocab_size, full=verify and manifest.bin_bytes <= VERIFIED_WHOLE_BYTES)
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise FieldError(
                "data.tokenizer",
                data.tokenizer,
                f"is not the tokenizer that wrote {prefix}",
                "give that one, or prepare the data again",
            )
    return tokenizer


def read_document_tokens(prefix: str | Path, document: int) -> npt.NDArray[np.int64]:
    """The token ids of one document, with its end of document.

    Raises:
        FieldError: there is no such document.
    """
    manifest = load_manifest(prefix)
    if not 0 <= document < manifest.num_documents:
        raise FieldError(
            "document",
            document,
            f"{prefix} has {manifest.num_documents} documents",
            "count from 0 to one less",
        )
    idx_path = token_file(prefix, ".idx")
    lengths = np.memmap(
        idx_path, dtype="<i4", mode="r", offset=INDEX_HEADER.size, shape=(manifest.num_documents,)
    )
    pointers = np.memmap(
        idx_path,
        dtype="<i8",
        mode="r",
        offset=INDEX_HEADER.size + lengths.nbytes,
        shape=(manifest.num_documents,),
    )
    tokens = np.memmap(token_file(prefix, ".bin"), dtype=manifest.dtype, mode="r")
    start = int(pointers[document]) // tokens.itemsize
    return tokens[start : start + int(lengths[document])].astype(np.int64)


def write_index(path: Path, document_tokens: npt.NDArray[np.int32], dtype: np.dtype[np.generic]) -> None:
    """Writes the .idx of documents with these numbers of tokens, in blocks, so that memory stays flat."""
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


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _blocks(values: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
    for start in range(0, len(values), BLOCK_BYTES // 8):
        yield values[start : start + BLOCK_BYTES // 8]


def _token_blocks(path: Path, manifest: TokenManifest) -> Iterator[npt.NDArray[np.generic]]:
    tokens = np.memmap(path, dtype=manifest.dtype, mode="r")
    for start in range(0, len(tokens), BLOCK_BYTES):
        yield tokens[start : start + BLOCK_BYTES]


def _check_size(path: Path, expected_bytes: int) -> None:
    with translate_os_errors(
        path, problem="cannot be read", remedy="check its permissions", missing=("is missing", PREPARE_AGAIN)
    ):
        size_bytes = path.stat().st_size
    if size_bytes != expected_bytes:
        state = "truncated" if size_bytes < expected_bytes else "longer than was written"
        raise FileProblem(path, f"is {state}: {size_bytes} bytes of {expected_bytes}", PREPARE_AGAIN)


def _check_index(path: Path, manifest: TokenManifest) -> None:
    with (
        translate_os_errors(path, problem="cannot be read", remedy="check its permissions"),
        open(path, "rb") as stream,
    ):
        header = stream.read(INDEX_HEADER.size)
    fields = INDEX_HEADER.unpack(header) if len(header) == INDEX_HEADER.size else (b"", 0, 0, 0, 0)
    if fields[:2] != (INDEX_MAGIC, INDEX_VERSION):
        raise FileProblem(path, "is not an index of token files", PREPARE_AGAIN)
    expected = (CODE_OF_DTYPE[manifest.dtype], manifest.num_documents, manifest.num_documents + 1)
    if fields[2:] != expected:
        raise FileProblem(
            path,
            f"says type, sequences, documents + 1 = {fields[2:]} where the record says {expected}",
            PREPARE_AGAIN,
        )
