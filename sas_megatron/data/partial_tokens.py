"""An unfinished preparation on disk: what PREFIX.partial/ holds, and how it becomes PREFIX.bin and .idx.

    plan.json      tokenizer and settings; another plan starts over
    tokens.bin     the tokens so far, in order
    lengths.bin    the tokens of each document so far, int32
    journal.jsonl  one line for each chunk that is in both, with the sha256 of its text
    manifest.json  only when all is done: what is left is to rename

A line of the journal follows its data, so that what a killed run leaves is whole up to the last line. On
going on the texts are read again (not encoded) and compared with the journal, chunk by chunk.
"""

from __future__ import annotations

import fcntl
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
from sas_megatron.data.token_files import token_file, write_index
from sas_megatron.io.files import make_folder, sync, write_file

PUBLISHED = {"tokens.bin": ".bin", "index.idx": ".idx", "manifest.json": ".json"}


@dataclass
class Totals:
    """Sums over the chunks that are done."""

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
        FileProblem: another process is preparing the same files.
    """

    def __init__(self, prefix: Path, plan: dict[str, Any], dtype: np.dtype[np.generic]) -> None:
        self._folder = token_file(prefix, ".partial")
        self._dtype = dtype
        self.totals = Totals()
        self._bin_hash = hashlib.sha256()
        self._text_hash = hashlib.sha256()
        make_folder(self._folder)
        self._lock = open(self._folder / "lock", "w")  # noqa: SIM115  # held until close
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise FileProblem(
                self._folder,
                "another process is preparing these files",
                "wait for it, or name another --output",
            ) from error
        self._start_or_go_on(plan)

    def __enter__(self) -> PartialTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in (self._tokens, self._lengths, self._journal, self._lock):
            stream.close()
        if self._folder.exists() and self.totals.num_chunks == 0:
            shutil.rmtree(self._folder)  # nothing worth going on from

    def skip_finished(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks that are still to be encoded; the rest is checked against the journal and kept."""
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
        self._cut_to_totals()
        if changed is not None:
            yield changed
        yield from remaining

    def append(self, chunk: Chunk, encoded: EncodedChunk) -> None:
        """Adds the chunk that follows."""
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
        """The sha256 over the digests of the chunks so far."""
        return self._text_hash.hexdigest()

    def bin_sha256(self) -> str:
        """The sha256 of the tokens so far."""
        return self._bin_hash.hexdigest()

    def write_index(self) -> Path:
        """Writes the .idx, brings it and the tokens to disk, and returns its path."""
        path = self._folder / "index.idx"
        write_index(path, np.memmap(self._folder / "lengths.bin", dtype="<i4", mode="r"), self._dtype)
        sync(path)
        sync(self._folder / "tokens.bin")
        return path

    def write_manifest(self, text: str) -> None:
        """Marks the preparation as done: from here on only `publish` is left."""
        write_file(self._folder / "manifest.json", text)

    def _start_or_go_on(self, plan: dict[str, Any]) -> None:
        plan_path = self._folder / "plan.json"
        if _read_json(plan_path) != plan:
            for name in ("journal.jsonl", "tokens.bin", "lengths.bin"):
                (self._folder / name).unlink(missing_ok=True)
            write_file(plan_path, json.dumps(plan, indent=2) + "\n")
        # "a+b" makes the file where there is none, and lets it be read and cut.
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
                    return  # the line that was being written when the run was killed
                yield record

    def _read_back(self, chunk: Chunk, record: dict[str, Any]) -> EncodedChunk | None:
        """The chunk's tokens from an earlier run, or None if the text or the files are not as then."""
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

    def _cut_to_totals(self) -> None:
        """Drops whatever lies beyond the chunks that are counted."""
        self._journal.seek(0)
        lines = [self._journal.readline() for _ in range(self.totals.num_chunks)]
        journal_bytes = sum(len(line.encode()) for line in lines)
        self._journal.truncate(journal_bytes)
        self._tokens.truncate(self.totals.token_bytes)
        self._lengths.truncate(self.totals.length_bytes)


def publish(prefix: Path) -> bool:
    """Renames a preparation that is done to PREFIX.bin, .idx and .json; goes on from a run killed in between.

    Returns whether there was one. The record comes last: with it the files are complete.
    """
    folder = token_file(prefix, ".partial")
    if not (folder / "manifest.json").exists():
        return False
    if (folder / "tokens.bin").exists():
        token_file(prefix, ".json").unlink(missing_ok=True)  # the record of what is now replaced
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
