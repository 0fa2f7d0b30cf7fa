"""Documents to token files: PREFIX.bin, PREFIX.idx and PREFIX.json.

    files -> text batches -> chunks -> worker processes -> PREFIX.partial/ -> renamed to PREFIX.*

One process reads, cuts and writes in order; the workers encode. Memory holds a few chunks a worker. A run
that was killed goes on from the chunks it had finished; the result does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sas_megatron import __version__
from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.data.chunks import CHUNK_BYTES, cut_chunks
from sas_megatron.data.documents import empty_corpus, stream_text_batches
from sas_megatron.data.encoding_pool import EncodingPool
from sas_megatron.data.partial_tokens import PartialTokens, publish
from sas_megatron.data.sources import SourceFile, find_source_files, fingerprint_files
from sas_megatron.data.token_files import (
    SCHEMA_VERSION,
    SourceRecord,
    TokenManifest,
    hash_file,
    token_file,
    verify_token_files,
)
from sas_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparationProgress:
    """How far a preparation is, with what an earlier run had done."""

    num_documents: int
    num_tokens: int
    text_bytes: int
    source_bytes_read: int
    source_bytes: int


@dataclass(frozen=True)
class Preparation:
    """What `prepare_token_files` did."""

    manifest: TokenManifest
    was_complete: bool  # the files were there, of the same documents
    resumed_chunks: int  # taken over from a run that did not end
    encoded_tokens: int  # without those taken over
    startup_seconds: float  # until the workers had imported their modules
    encoding_seconds: float  # from there until the files were renamed


def prepare_token_files(
    sources: Sequence[str | Path],
    *,
    tokenizer_path: Path,
    prefix: str | Path,
    text_column: str = "text",
    num_workers: int | None = None,
    overwrite: bool = False,
    report_progress: Callable[[PreparationProgress], None] | None = None,
) -> Preparation:
    """Writes the documents of the sources as token files for Megatron-core's datasets.

    Each document is one sequence ended by the tokenizer's end of document; empty documents are left out and
    counted. Returns at once when the files are there and the sources unchanged.

    Args:
        num_workers: processes that encode; by default as many as this process may use processors.
        overwrite: replace token files of other documents, or damaged ones.
        report_progress: called after each chunk.

    Raises:
        FieldError: `text_column` or `num_workers` is wrong.
        FileProblem: a source or the tokenizer cannot be read, or the files cannot be written, or others stand
            in their way.
        UserError: there is no document with text, or a worker was killed.
    """
    started = time.perf_counter()
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise FieldError(
            "workers", num_workers, "must be at least one process", "use the number of processors"
        )
    if str(prefix).endswith(os.sep) or not Path(prefix).name:
        raise FieldError(
            "output", prefix, "must end in a name", "the files get the endings .bin, .idx and .json"
        )
    prefix = Path(prefix)
    tokenizer = Tokenizer(tokenizer_path)
    files = find_source_files(sources)
    plan = {"tokenizer_sha256": tokenizer.sha256, "text_column": text_column, "chunk_bytes": CHUNK_BYTES}
    # Code that reads raises its own user errors, so an OSError here comes from writing.
    with translate_os_errors(
        prefix,
        problem="cannot be written",
        remedy="name another --output, or fix the permissions",
        disk_full_remedy="free disk space and run the command again: it resumes where it stopped",
    ):
        publish(prefix)
        complete = None if overwrite else _find_complete(prefix, files, plan)
        if complete is not None:
            return Preparation(complete, True, 0, 0, 0.0, 0.0)
        with (
            PartialTokens(prefix, plan, tokenizer.token_dtype) as partial,
            EncodingPool(tokenizer_path, num_workers) as pool,
        ):
            pool.wait_until_ready(tokenizer.sha256)
            ready = time.perf_counter()
            resumed_chunks, encoded_tokens = _encode(pool, partial, files, text_column, report_progress)
            if partial.totals.num_documents == 0:
                partial.totals.num_chunks = 0
                raise empty_corpus(sources)
            manifest = _build_manifest(partial, tokenizer, sources, files, text_column)
            partial.write_manifest(manifest.model_dump_json(indent=2) + "\n")
        publish(prefix)
    ended = time.perf_counter()
    return Preparation(manifest, False, resumed_chunks, encoded_tokens, ready - started, ended - ready)


def _encode(
    pool: EncodingPool,
    partial: PartialTokens,
    files: Sequence[SourceFile],
    text_column: str,
    report_progress: Callable[[PreparationProgress], None] | None,
) -> tuple[int, int]:
    """Brings the partial files to the end of the sources; returns chunks taken over and tokens encoded."""
    source_bytes = sum(file.size_bytes for file in files)
    chunks = cut_chunks(stream_text_batches(files, text_column=text_column))
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


def _find_complete(prefix: Path, files: Sequence[SourceFile], plan: dict[str, Any]) -> TokenManifest | None:
    """The record of token files of the same documents; None when there are no files yet."""
    if not any(token_file(prefix, ending).exists() for ending in (".bin", ".idx", ".json")):
        return None
    manifest = verify_token_files(prefix)
    remedy = "name another --output, or give --overwrite to replace them"
    path = token_file(prefix, ".json")
    if manifest.tokenizer_sha256 != plan["tokenizer_sha256"]:
        raise FileProblem(
            path, f"the token files are there, of another tokenizer ({manifest.tokenizer_path})", remedy
        )
    fingerprint = fingerprint_files(files)
    if manifest.sources_fingerprint == fingerprint and manifest.text_column == plan["text_column"]:
        return manifest
    # Copied or touched files hold perhaps the same text: reading it again is cheap, encoding it is not.
    digest = hashlib.sha256()
    for chunk in cut_chunks(stream_text_batches(files, text_column=plan["text_column"])):
        digest.update(chunk.digest)
    if digest.hexdigest() != manifest.text_sha256:
        raise FileProblem(path, "the token files are there, of other documents", remedy)
    return manifest


def _build_manifest(
    partial: PartialTokens,
    tokenizer: Tokenizer,
    sources: Sequence[str | Path],
    files: Sequence[SourceFile],
    text_column: str,
) -> TokenManifest:
    totals = partial.totals
    idx_path = partial.write_index()
    return TokenManifest(
        schema_version=SCHEMA_VERSION,
        num_documents=totals.num_documents,
        num_tokens=totals.num_tokens,
        text_bytes=totals.text_bytes,
        empty_documents=totals.empty_documents,
        dtype="uint16" if tokenizer.token_dtype.itemsize == 2 else "int32",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        max_token_id=totals.max_token_id,
        tokenizer_path=str(tokenizer.path.absolute()),
        tokenizer_sha256=tokenizer.sha256,
        text_column=text_column,
        sources=[_record_source(source) for source in sources],
        sources_fingerprint=fingerprint_files(files),
        text_sha256=partial.text_sha256(),
        bin_bytes=totals.token_bytes,
        bin_sha256=partial.bin_sha256(),
        idx_bytes=idx_path.stat().st_size,
        idx_sha256=hash_file(idx_path),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        package_version=__version__,
    )


def _record_source(source: str | Path) -> SourceRecord:
    files = find_source_files([source])
    size_bytes = sum(file.size_bytes for file in files)
    return SourceRecord(path=str(Path(source).absolute()), num_files=len(files), size_bytes=size_bytes)
