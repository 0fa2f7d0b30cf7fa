"""Megatron-core's indexed datasets, PREFIX.bin and PREFIX.idx, and their manifest, PREFIX.json.

This module reads and writes them with numpy, so that inspecting them requires neither torch nor
Megatron-core. The .bin file holds the concatenated tokens of all documents; `token_index` describes the .idx
file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from sas_megatron import __version__
from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.data.document_split import check_split
from sas_megatron.data.round_trip import EXACT
from sas_megatron.data.token_index import (
    BLOCK_BYTES,
    PREPARE_AGAIN,
    TokenType,
    check_header,
    check_positions,
    count_index_bytes,
    read_lengths,
    read_offsets,
)
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.io.file_records import describe_file
from sas_megatron.io.files import format_path

# Version 2 added `end_of_document`, `round_trip` and `adopted`.
SCHEMA_VERSION = 2
_READABLE_VERSIONS = (1, SCHEMA_VERSION)
# Token files up to this size are read completely before a run, which takes about 1 s. Of larger ones only
# sizes, headers and manifests are compared; `sas-megatron data inspect --verify` reads them completely.
MAX_FULLY_VERIFIED_BYTES = 2**30


class SourceRecord(BaseModel):
    """A source file or folder, as it was when the documents were encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    num_files: int
    size_bytes: int


class TokenManifest(BaseModel):
    """Contents and sources of PREFIX.bin and PREFIX.idx; stored as PREFIX.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    adopted: bool = False  # another program wrote the token files; their texts are not known
    num_documents: PositiveInt
    num_tokens: PositiveInt  # including the end-of-document tokens
    text_bytes: int
    empty_documents: int  # number of documents left out because they are empty
    documents_without_end: int = 0  # only of adopted files
    dtype: TokenType
    vocab_size: int
    eos_id: int
    # None in version 1, of which all tokenizers were exact.
    end_of_document: str | None = None
    round_trip: str = EXACT
    max_token_id: int
    tokenizer_path: str
    tokenizer_sha256: str
    text_column: str | None = None
    sources: list[SourceRecord]
    sources_fingerprint: str | None = None  # sha256 of path, size and modification time of each file
    text_sha256: str | None = None  # sha256 of the digests of all chunks
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    created: str
    package_version: str


def token_file(prefix: str | Path, ending: str) -> Path:
    """Return the path of a prefix with an ending such as `.bin`; the prefix itself may contain dots."""
    return Path(f"{prefix}{ending}")


def build_manifest(tokenizer: Tokenizer, idx_path: Path, **contents: Any) -> TokenManifest:
    """Return the manifest of complete token files.

    Args:
        tokenizer: The tokenizer of the tokens.
        idx_path: The index.
        contents: The other fields. `dtype` and `tokenizer_path` replace those of the tokenizer.
    """
    index = describe_file(idx_path)
    fields = {
        "schema_version": SCHEMA_VERSION,
        "dtype": tokenizer.token_dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "end_of_document": tokenizer.end_of_document,
        "round_trip": tokenizer.round_trip,
        "tokenizer_path": format_path(Path(tokenizer.absolute_location)),
        "tokenizer_sha256": tokenizer.sha256,
        "idx_bytes": index.size_bytes,
        "idx_sha256": index.sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "package_version": __version__,
    }
    return TokenManifest(**{**fields, **contents})


def load_manifest(prefix: str | Path) -> TokenManifest:
    """Load the manifest of token files.

    Raises:
        FileProblem: It is missing, unreadable, or of another schema version.
    """
    path = token_file(prefix, ".json")
    with translate_os_errors(
        path,
        problem="cannot be read",
        remedy=PREPARE_AGAIN,
        missing=(
            "does not exist, so the token files are missing or incomplete",
            "use `sas-megatron data prepare`, or `sas-megatron data adopt` for token files of Megatron",
        ),
    ):
        content = path.read_bytes()
    try:
        manifest = TokenManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the entire file"
        raise FileProblem(
            path, f"is not a manifest of token files ({where}: {first['msg']})", PREPARE_AGAIN
        ) from error
    if manifest.schema_version not in _READABLE_VERSIONS:
        raise FileProblem(
            path,
            f"has schema version {manifest.schema_version}, and this program reads up to {SCHEMA_VERSION}",
            PREPARE_AGAIN,
        )
    return manifest


def name_token_files(prefixes: Sequence[str]) -> dict[str, str]:
    """Return a unique name for each prefix: its last component, or the prefix if several end in the same."""
    counts = Counter(Path(prefix).name for prefix in set(prefixes))
    return {prefix: name if counts[name := Path(prefix).name] == 1 else prefix for prefix in prefixes}


def verify_token_files(
    prefix: str | Path, vocab_size: int | None = None, *, full: bool = False
) -> TokenManifest:
    """Check token files against their manifest, each other and a vocabulary.

    Args:
        prefix: Path of the token files without ending.
        vocab_size: Number of tokens of the vocabulary; by default that of the manifest.
        full: Check every byte (sha256) and every token id in addition to sizes and headers.

    Returns:
        The manifest.

    Raises:
        FileProblem: A file is missing, damaged or truncated, or has a token outside of the vocabulary.
    """
    manifest = load_manifest(prefix)
    bin_path, idx_path = token_file(prefix, ".bin"), token_file(prefix, ".idx")
    _check_size(bin_path, manifest.bin_bytes)
    _check_size(idx_path, manifest.idx_bytes)
    check_header(idx_path, dtype=manifest.dtype, num_documents=manifest.num_documents)
    token_bytes = np.dtype(manifest.dtype).itemsize
    for path, size_bytes, count, unit, expected_bytes in (
        (bin_path, manifest.bin_bytes, manifest.num_tokens, "tokens", manifest.num_tokens * token_bytes),
        (
            idx_path,
            manifest.idx_bytes,
            manifest.num_documents,
            "documents",
            count_index_bytes(manifest.num_documents),
        ),
    ):
        if size_bytes != expected_bytes:
            raise FileProblem(
                path, f"has {size_bytes} bytes, but {count} {unit} take {expected_bytes}", PREPARE_AGAIN
            )
    limit = manifest.vocab_size if vocab_size is None else vocab_size
    _check_token(manifest.max_token_id, limit, bin_path)
    if full:
        for path, sha256 in ((bin_path, manifest.bin_sha256), (idx_path, manifest.idx_sha256)):
            if describe_file(path).sha256 != sha256:
                raise FileProblem(path, "has changed since it was written (sha256)", PREPARE_AGAIN)
        check_positions(
            idx_path,
            num_documents=manifest.num_documents,
            num_tokens=manifest.num_tokens,
            token_bytes=token_bytes,
        )
        for block in _token_blocks(bin_path, manifest):
            check_token_range(block, limit, bin_path)
    return manifest


def open_token_files(data: DataConfig, *, vocab_size: int, verify: bool = False) -> Tokenizer:
    """Check token files, tokenizer and model against each other before a run, and return the tokenizer.

    Args:
        data: Names the token files and the tokenizer.
        vocab_size: Vocabulary size of the model, without padding.
        verify: Read files up to `MAX_FULLY_VERIFIED_BYTES` completely, to find damage and invalid token ids.

    Raises:
        FieldError: A token file was encoded with another tokenizer, its training or validation part is
            shorter than one sample, or the tokenizer has more tokens than the model.
        FileProblem: A file is missing or damaged, or has a token outside of the model's vocabulary.
    """
    tokenizer = load_tokenizer(data.tokenizer, end_of_document=data.end_of_document)
    if not tokenizer.fits(vocab_size):
        raise FieldError(
            "model.vocab_size",
            vocab_size,
            f"must not be less than the {tokenizer.vocab_size} tokens of {data.tokenizer}",
            f"use {tokenizer.vocab_size}",
            (f"model.vocab_size={tokenizer.vocab_size}",),
        )
    for prefix in data.prefixes:
        manifest = load_manifest(prefix)
        # Megatron-core would search for the tokens of a sample in an endless loop.
        if manifest.num_tokens <= data.sequence_length:
            raise FieldError(
                "data.sequence_length",
                data.sequence_length,
                f"must be less than the {manifest.num_tokens} tokens of {prefix}",
                "prepare more documents, or use a shorter sequence",
            )
        verify_token_files(prefix, vocab_size, full=verify and manifest.bin_bytes <= MAX_FULLY_VERIFIED_BYTES)
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            if manifest.end_of_document not in (None, tokenizer.end_of_document):
                raise FieldError(
                    "data.end_of_document",
                    data.end_of_document,
                    f"gives {tokenizer.end_of_document}, but the documents of {prefix} end with "
                    f"{manifest.end_of_document}",
                    f"use {manifest.end_of_document}",
                )
            raise FieldError(
                "data.tokenizer",
                data.tokenizer,
                f"is not the tokenizer that encoded {prefix}",
                "name that tokenizer, or prepare the data again",
            )
    check_split(data, {prefix: read_document_lengths(prefix) for prefix in data.prefixes})
    return tokenizer


def read_document_lengths(prefix: str | Path) -> npt.NDArray[np.int32]:
    """Return the number of tokens of each document, including the end-of-document token; int32 [documents].

    The array is mapped from the .idx file, so that a long one is read only where it is used.

    Raises:
        FileProblem: The manifest is missing or invalid, or the .idx file cannot be read.
    """
    return read_lengths(token_file(prefix, ".idx"), load_manifest(prefix).num_documents)


def read_document_tokens(prefix: str | Path, document: int) -> npt.NDArray[np.int64]:
    """Return the token ids of one document, including the end-of-document token.

    Args:
        prefix: Path of the token files without ending.
        document: Index of the document.

    Returns:
        int64 [tokens of the document].

    Raises:
        FieldError: The files have fewer documents.
        FileProblem: The manifest is missing or invalid, or the document's position or tokens are damaged.
    """
    manifest = load_manifest(prefix)
    if not 0 <= document < manifest.num_documents:
        raise FieldError(
            "document",
            document,
            f"{prefix} has {manifest.num_documents} documents",
            f"use 0 to {manifest.num_documents - 1}",
        )
    idx_path, bin_path = token_file(prefix, ".idx"), token_file(prefix, ".bin")
    length = int(read_lengths(idx_path, manifest.num_documents)[document])
    tokens = np.memmap(bin_path, dtype=manifest.dtype, mode="r")
    start = int(read_offsets(idx_path, manifest.num_documents)[document]) // tokens.itemsize
    if start < 0 or length < 1 or start + length > len(tokens):
        raise FileProblem(idx_path, f"has a wrong position for document {document}", PREPARE_AGAIN)
    found = tokens[start : start + length].astype(np.int64)
    check_token_range(found, manifest.vocab_size, bin_path)
    return found


def check_token_range(tokens: npt.NDArray[np.generic], vocab_size: int, path: Path) -> None:
    """Check that tokens of a .bin file are ids of a vocabulary.

    Raises:
        FileProblem: One is not.
    """
    _check_token(_find_extreme_token(tokens), vocab_size, path)


def _check_token(token: int, vocab_size: int, path: Path) -> None:
    if not 0 <= token < vocab_size:
        raise FileProblem(
            path,
            f"has token id {token}, outside of the vocabulary of {vocab_size}",
            "use the tokenizer that encoded it, or prepare the data with yours",
        )


def _find_extreme_token(tokens: npt.NDArray[np.generic]) -> int:
    """Return the largest token id, or the smallest one if that is negative."""
    smallest = int(tokens.min())
    return smallest if smallest < 0 else int(tokens.max())


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
        state = "truncated" if size_bytes < expected_bytes else "longer than when it was written"
        raise FileProblem(path, f"is {state}: {size_bytes} bytes of {expected_bytes}", PREPARE_AGAIN)
