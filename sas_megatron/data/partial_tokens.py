"""The files of an unfinished preparation, PREFIX.partial/, and their publication as .bin, .idx and .json.

    plan.json      tokenizer and settings; a different plan starts from the beginning
    tokens.bin     the tokens written so far, in order
    lengths.bin    the number of tokens of each document written so far, int32
    journal.jsonl  one line for each chunk in both files, with the sha256 of its text
    manifest.json  written when everything is encoded; only renaming remains

The journal line of a chunk is written after its data, so the files of a killed run are complete up to the
last line. A resumed run reads the texts again, without encoding them, and compares them with the journal by
chunk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import replace as rename_file
from pathlib import Path
from typing import Any

import numpy as np

from sas_megatron.config.errors import FileProblem
from sas_megatron.data.chunks import Chunk
from sas_megatron.data.encoding_worker import EncodedChunk
from sas_megatron.data.token_files import token_file
from sas_megatron.data.token_index import write_index
from sas_megatron.io.file_locks import acquire_file_lock
from sas_megatron.io.files import make_folder, sync, write_file

PUBLISHED = {"tokens.bin": ".bin", "index.idx": ".idx", "manifest.json": ".json"}


@dataclass
class Totals:
    """Sums over the finished chunks."""

    num_chunks: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    max_token_id: int = -1
    token_bytes: int = 0
    length_bytes: int = 0


class PartialTokens:
    """The folder of an unfinished preparation, locked while it is open; a context manager.

    Raises:
        FileProblem: Another process is preparing the same files.
        OSError: The folder cannot be written.
    """

    def __init__(self, prefix: Path, plan: dict[str, Any], dtype: np.dtype[np.generic]) -> None:
        self._folder = token_file(prefix, ".partial")
        self._dtype = dtype
        self.totals = Totals()
        self._bin_hash = hashlib.sha256()
        self._text_hash = hashlib.sha256()
        make_folder(self._folder)
        self._lock = open(self._folder / "lock", "w", encoding="utf-8")  # noqa: SIM115  # locked until closed
        if not acquire_file_lock(self._lock.fileno()):
            self._lock.close()
            raise FileProblem(
                self._folder,
                "another process is preparing these files",
                "wait for it to finish, or name another --output",
            )
        try:
            self._start_or_resume(plan)
        except OSError:
            self._lock.close()
            if not (self._folder / "journal.jsonl").exists():
                shutil.rmtree(self._folder, ignore_errors=True)  # no chunk to resume from
            raise

    def __enter__(self) -> PartialTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in (self._tokens, self._lengths, self._journal, self._lock):
            stream.close()
        if self._folder.exists() and self.totals.num_chunks == 0:
            shutil.rmtree(self._folder)  # no chunk to resume from

    def skip_finished(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks to encode; chunks that match the journal keep their tokens and are skipped."""
        remaining = iter(chunks)
        changed: Chunk | None = None
        for record in self._read_journal():
            chunk = next(remaining, None)
            if chunk is None:
                break
            encoded = self._read_back(chunk, record)
            if encoded is None:
                changed = chunk
                break
            self._count(chunk, encoded)
        self._truncate_to_totals()
        if changed is not None:
            yield changed
        yield from remaining

    def append(self, chunk: Chunk, encoded: EncodedChunk) -> None:
        """Append the tokens of the next chunk."""
        self._tokens.write(encoded.tokens)
        self._lengths.write(encoded.document_tokens)
        self._tokens.flush()
        self._lengths.flush()
        record = {
            "text_sha256": chunk.digest.hex(),
            "token_bytes": len(encoded.tokens),
            "length_bytes": len(encoded.document_tokens),
            "crc32": _checksum(encoded),
            "max_token_id": encoded.max_token_id,
        }
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        self._count(chunk, encoded)

    def text_sha256(self) -> str:
        """Return the sha256 of the digests of the finished chunks."""
        return self._text_hash.hexdigest()

    def bin_sha256(self) -> str:
        """Return the sha256 of the tokens written so far."""
        return self._bin_hash.hexdigest()

    def write_index(self) -> Path:
        """Write the .idx file, sync it and the tokens to disk, and return its path."""
        path = self._folder / "index.idx"
        write_index(path, np.memmap(self._folder / "lengths.bin", dtype="<i4", mode="r"), self._dtype)
        sync(path)
        sync(self._folder / "tokens.bin")
        return path

    def write_manifest(self, text: str) -> None:
        """Write the manifest, which marks the preparation as ready for `publish`."""
        write_file(self._folder / "manifest.json", text)

    def _start_or_resume(self, plan: dict[str, Any]) -> None:
        plan_path = self._folder / "plan.json"
        if _read_json(plan_path) != plan:
            for name in ("journal.jsonl", "tokens.bin", "lengths.bin"):
                (self._folder / name).unlink(missing_ok=True)
            write_file(plan_path, json.dumps(plan, indent=2) + "\n")
        # "a+b" creates a missing file and allows reading and truncation.
        self._tokens = open(self._folder / "tokens.bin", "a+b")  # noqa: SIM115
        self._lengths = open(self._folder / "lengths.bin", "a+b")  # noqa: SIM115
        self._journal = open(self._folder / "journal.jsonl", "a+", encoding="utf-8")  # noqa: SIM115
        self._tokens.seek(0)
        self._lengths.seek(0)

    def _read_journal(self) -> Iterator[dict[str, Any]]:
        with open(self._folder / "journal.jsonl", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    return  # an incomplete line, written when the run was killed
                yield record

    def _read_back(self, chunk: Chunk, record: dict[str, Any]) -> EncodedChunk | None:
        """Return the chunk's tokens of an earlier run; None if its text or the files have changed."""
        if record["text_sha256"] != chunk.digest.hex():
            return None
        tokens = self._tokens.read(record["token_bytes"])
        lengths = self._lengths.read(record["length_bytes"])
        encoded = EncodedChunk(chunk.index, tokens, lengths, record["max_token_id"])
        return encoded if _checksum(encoded) == record["crc32"] else None

    def _count(self, chunk: Chunk, encoded: EncodedChunk) -> None:
        self._bin_hash.update(encoded.tokens)
        self._text_hash.update(chunk.digest)
        totals = self.totals
        totals.num_chunks += 1
        totals.num_documents += len(chunk.document_bytes)
        totals.num_tokens += len(encoded.tokens) // self._dtype.itemsize
        totals.text_bytes += len(chunk.text)
        totals.empty_documents += chunk.empty_documents
        totals.max_token_id = max(totals.max_token_id, encoded.max_token_id)
        totals.token_bytes += len(encoded.tokens)
        totals.length_bytes += len(encoded.document_tokens)

    def _truncate_to_totals(self) -> None:
        """Truncate the files after the counted chunks."""
        self._journal.seek(0)
        lines = [self._journal.readline() for _ in range(self.totals.num_chunks)]
        journal_bytes = sum(len(line.encode()) for line in lines)
        self._journal.truncate(journal_bytes)
        self._tokens.truncate(self.totals.token_bytes)
        self._lengths.truncate(self.totals.length_bytes)


def publish(prefix: Path) -> bool:
    """Rename the files of a completed preparation to PREFIX.bin, .idx and .json.

    PREFIX.json is renamed last and marks the token files as complete. A run that was killed between two
    renames is completed by the next call.

    Returns:
        Whether there was a completed preparation.

    Raises:
        OSError: A file cannot be renamed.
    """
    folder = token_file(prefix, ".partial")
    if not (folder / "manifest.json").exists():
        return False
    if (folder / "tokens.bin").exists():
        token_file(prefix, ".json").unlink(missing_ok=True)  # the manifest of the files to be replaced
    for name, ending in PUBLISHED.items():
        if (folder / name).exists():
            rename_file(folder / name, token_file(prefix, ending))
    sync(folder.parent)
    shutil.rmtree(folder)
    return True


def _checksum(encoded: EncodedChunk) -> int:
    return zlib.crc32(encoded.document_tokens, zlib.crc32(encoded.tokens))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
