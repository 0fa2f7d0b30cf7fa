"""Encode documents as token files: PREFIX.bin, PREFIX.idx and PREFIX.json.

    files -> text batches -> chunks -> worker processes -> PREFIX.partial/ -> renamed to PREFIX.*

One process reads, splits and writes in order; the workers encode. Memory holds a few chunks per worker. A run
that was killed resumes after its finished chunks. The result does not depend on the number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.data.chunks import CHUNK_BYTES, cut_chunks
from sas_megatron.data.documents import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    TextBatch,
    empty_corpus,
    stream_text_batches,
)
from sas_megatron.data.encoding_pool import EncodingPool, RefusedDocument
from sas_megatron.data.partial_tokens import PartialTokens, publish
from sas_megatron.data.sources import Source, SourceFile, find_sources, fingerprint_files
from sas_megatron.data.token_files import (
    SourceRecord,
    TokenManifest,
    build_manifest,
    token_file,
    verify_token_files,
)
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.io.files import format_path

logger = logging.getLogger(__name__)

# More processes would only take memory: the largest machines have about this many CPUs.
MAX_WORKERS = 1024


@dataclass(frozen=True)
class PreparationProgress:
    """Progress of a preparation, including the chunks of an earlier run."""

    num_documents: int
    num_tokens: int
    text_bytes: int
    source_bytes_read: int
    source_bytes: int


@dataclass(frozen=True)
class Preparation:
    """Result of `prepare_token_files`."""

    manifest: TokenManifest
    was_complete: bool  # token files of the same documents existed already
    resumed_chunks: int  # chunks encoded by an earlier run that did not finish
    encoded_tokens: int  # tokens encoded by this run
    startup_seconds: float  # time until the workers had imported their modules
    encoding_seconds: float  # time from then until the files were renamed


def prepare_token_files(
    sources: Sequence[str | Path],
    *,
    tokenizer_path: str | Path,
    prefix: str | Path,
    end_of_document: str | None = None,
    text_column: str = "text",
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    num_workers: int | None = None,
    overwrite: bool = False,
    report_progress: Callable[[PreparationProgress], None] | None = None,
) -> Preparation:
    """Write the documents of the sources as token files for Megatron-core's datasets.

    Each document is one sequence that ends with the tokenizer's end-of-document token. Empty documents are
    left out and counted. If the files exist and the sources are unchanged, the function returns immediately.

    Args:
        sources: Files and folders of documents.
        tokenizer_path: A tokenizer, as in `load_tokenizer`.
        prefix: Path of the token files without ending.
        end_of_document: Name of the special token after each document; by default that of the tokenizer.
        text_column: Column of the documents' text.
        max_document_bytes: The largest document that is read.
        num_workers: Number of worker processes; by default the number of CPUs available to this process.
        overwrite: Replace token files of other documents and damaged ones.
        report_progress: Called after each chunk.

    Raises:
        FieldError: `text_column`, `num_workers` or `prefix` is invalid, or a document is too large.
        FileProblem: A source or the tokenizer cannot be read, the library of the tokenizer cannot encode a
            document, the token files cannot be written, or token files of other documents exist.
        UserError: No document has text, or a worker was killed.
    """
    started = time.perf_counter()
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    _check_arguments(prefix, num_workers=num_workers)
    prefix = Path(prefix)
    tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
    if not tokenizer.is_exact:
        logger.warning(
            "%s: decoded tokens are not exactly the text: %s", tokenizer.location, tokenizer.round_trip
        )
    found = find_sources(sources, text_column=text_column)
    files = [file for source in found for file in source.files]
    read = functools.partial(
        stream_text_batches, files, text_column=text_column, max_document_bytes=max_document_bytes
    )
    plan = {"tokenizer_sha256": tokenizer.sha256, "text_column": text_column, "chunk_bytes": CHUNK_BYTES}
    with _translate_write_errors(prefix):
        publish(prefix)
        complete = None if overwrite else _find_complete(prefix, files, plan, read)
        if complete is not None:
            return Preparation(complete, True, 0, 0, 0.0, 0.0)
        with (
            PartialTokens(prefix, plan, tokenizer.token_dtype) as partial,
            EncodingPool(tokenizer, num_workers) as pool,
        ):
            pool.wait_until_ready()
            ready = time.perf_counter()
            try:
                resumed_chunks, encoded_tokens = _encode(
                    pool,
                    partial,
                    batches=read(),
                    source_bytes=sum(file.size_bytes for file in files),
                    report_progress=report_progress,
                )
            except RefusedDocument as refused:
                raise _locate(refused, read()) from refused
            manifest = _write_manifest(partial, tokenizer=tokenizer, sources=found, text_column=text_column)
        publish(prefix)
    ended = time.perf_counter()
    return Preparation(manifest, False, resumed_chunks, encoded_tokens, ready - started, ended - ready)


def _translate_write_errors(prefix: Path) -> AbstractContextManager[None]:
    # Code that reads raises its own user errors, so an OSError comes from writing.
    return translate_os_errors(
        prefix,
        problem="cannot be written",
        remedy="name another --output, or fix the permissions",
        disk_full_remedy="free disk space and run the command again: it resumes where it stopped",
    )


def _check_arguments(prefix: str | Path, *, num_workers: int) -> None:
    if not 1 <= num_workers <= MAX_WORKERS:
        raise FieldError(
            "workers",
            num_workers,
            f"must be between 1 and {MAX_WORKERS:,} processes",
            "use the number of CPUs",
        )
    if str(prefix).endswith(os.sep) or not Path(prefix).name:
        raise FieldError(
            "output", prefix, "must end in a file name", "append a name without ending, such as tokens"
        )


def _encode(
    pool: EncodingPool,
    partial: PartialTokens,
    *,
    batches: Iterator[TextBatch],
    source_bytes: int,
    report_progress: Callable[[PreparationProgress], None] | None,
) -> tuple[int, int]:
    """Encode the remaining chunks; return the number of earlier chunks and of newly encoded tokens."""
    chunks = cut_chunks(batches)
    encoded_chunks = encoded_tokens = 0
    for chunk, encoded in pool.encode(partial.skip_finished(chunks)):
        tokens_before = partial.totals.num_tokens
        partial.append(chunk, encoded)
        encoded_chunks += 1
        encoded_tokens += partial.totals.num_tokens - tokens_before
        if report_progress is not None:
            totals = partial.totals
            report_progress(
                PreparationProgress(
                    totals.num_documents,
                    totals.num_tokens,
                    totals.text_bytes,
                    chunk.source_bytes_read,
                    source_bytes,
                )
            )
    return partial.totals.num_chunks - encoded_chunks, encoded_tokens


def _locate(refused: RefusedDocument, batches: Iterator[TextBatch]) -> FileProblem:
    """Return the error for a document that the tokenizer's library cannot encode, with its file and place."""
    before = row = 0
    file: SourceFile | None = None
    for batch in batches:
        row = row if batch.file is file else 0
        file = batch.file
        for text in batch.texts:
            if text.is_valid and len(text.as_buffer()):
                if before == refused.number:
                    return FileProblem(
                        file.path,
                        f"has a text that the library of the tokenizer cannot encode, document {row} counted "
                        f"from 0, {len(text.as_buffer()):,} bytes, {refused.refused.text[:40]!r}… "
                        f"({refused.refused.reason})",
                        "split or remove this document",
                    )
                before += 1
            row += 1
    raise AssertionError("the documents changed while they were read")


def _find_complete(
    prefix: Path, files: Sequence[SourceFile], plan: dict[str, Any], read: Callable[[], Iterator[TextBatch]]
) -> TokenManifest | None:
    """Return the manifest of existing token files of the same documents; None if no token files exist.

    Raises:
        FileProblem: The token files are damaged, or were written from other documents or with another
            tokenizer.
    """
    if not any(token_file(prefix, ending).exists() for ending in (".bin", ".idx", ".json")):
        return None
    manifest = verify_token_files(prefix)
    remedy = "name another --output, or give --overwrite to replace them"
    path = token_file(prefix, ".json")
    if manifest.tokenizer_sha256 != plan["tokenizer_sha256"]:
        raise FileProblem(path, f"token files of another tokenizer exist ({manifest.tokenizer_path})", remedy)
    fingerprint = fingerprint_files(files)
    if manifest.sources_fingerprint == fingerprint and manifest.text_column == plan["text_column"]:
        return manifest
    # Copied or touched files may have the same text. Reading it again is cheap, encoding it is not.
    digest = hashlib.sha256()
    for chunk in cut_chunks(read()):
        digest.update(chunk.digest)
    if digest.hexdigest() != manifest.text_sha256:
        raise FileProblem(path, "token files of other documents exist", remedy)
    return manifest


def _write_manifest(
    partial: PartialTokens,
    *,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    text_column: str,
) -> TokenManifest:
    """Write index and manifest of the encoded documents; return the manifest.

    Raises:
        UserError: No document has text.
    """
    totals = partial.totals
    if totals.num_documents == 0:
        totals.num_chunks = 0
        raise empty_corpus([source.path for source in sources])
    idx_path = partial.write_index()
    manifest = build_manifest(
        tokenizer,
        idx_path,
        num_documents=totals.num_documents,
        num_tokens=totals.num_tokens,
        text_bytes=totals.text_bytes,
        empty_documents=totals.empty_documents,
        max_token_id=totals.max_token_id,
        text_column=text_column,
        sources=[_record_source(source) for source in sources],
        sources_fingerprint=fingerprint_files(file for source in sources for file in source.files),
        text_sha256=partial.text_sha256(),
        bin_bytes=totals.token_bytes,
        bin_sha256=partial.bin_sha256(),
    )
    partial.write_manifest(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _record_source(source: Source) -> SourceRecord:
    return SourceRecord(
        path=format_path(source.path.absolute()), num_files=len(source.files), size_bytes=source.size_bytes
    )
