"""Chunks: the unit in which a corpus is encoded, checked and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sas_megatron.config.errors import FileProblem

if TYPE_CHECKING:  # workers import this file, and do without pyarrow
    from sas_megatron.data.documents import TextBatch

# Small, because at the end of a corpus workers wait for the last chunk: 0.1 s at a million tokens a second.
CHUNK_BYTES = 1 << 19
# sentencepiece counts in 32 bits and needs about 30 bytes of memory a byte of document.
MAX_DOCUMENT_BYTES = 1 << 30


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: their UTF-8 in one buffer, none of them empty."""

    index: int
    document_bytes: npt.NDArray[np.int64]  # [documents], the length of each
    text: bytes
    empty_documents: int  # left out since the chunk before
    source_bytes_read: int

    @cached_property
    def digest(self) -> bytes:
        """The sha256 over lengths and texts."""
        digest = hashlib.sha256(self.document_bytes.astype("<i8").tobytes())
        digest.update(self.text)
        return digest.digest()

    def documents(self) -> list[bytes]:
        """The UTF-8 of each document."""
        ends = np.cumsum(self.document_bytes).tolist()
        starts = [0, *ends[:-1]]
        return [self.text[start:end] for start, end in zip(starts, ends, strict=True)]


def cut_chunks(batches: Iterable[TextBatch], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Chunks of the first documents that fill `chunk_bytes`; where they end depends on the documents alone.

    Raises:
        FileProblem: one document is larger than sentencepiece can take.
    """
    lengths: list[npt.NDArray[np.int64]] = []
    texts: list[bytes] = []
    gathered_bytes = empty_documents = source_bytes_read = index = 0

    def gathered() -> Chunk:
        return Chunk(index, np.concatenate(lengths), b"".join(texts), empty_documents, source_bytes_read)

    for batch in batches:
        batch_lengths, batch_text = _lengths_and_text(batch)
        source_bytes_read = batch.source_bytes_read
        empty_documents += len(batch.texts) - len(batch_lengths)
        ends = np.cumsum(batch_lengths)
        row = start = 0
        while row < len(batch_lengths):
            # The document that fills the chunk is its last one.
            last = int(np.searchsorted(ends, start + chunk_bytes - gathered_bytes))
            end_row = min(last + 1, len(batch_lengths))
            end = int(ends[end_row - 1])
            lengths.append(batch_lengths[row:end_row])
            texts.append(batch_text[start:end])
            gathered_bytes += end - start
            row, start = end_row, end
            if gathered_bytes >= chunk_bytes:
                yield gathered()
                lengths, texts, gathered_bytes, empty_documents = [], [], 0, 0
                index += 1
    if lengths or empty_documents:
        lengths.append(np.zeros(0, dtype=np.int64))
        yield gathered()


def _lengths_and_text(batch: TextBatch) -> tuple[npt.NDArray[np.int64], bytes]:
    """The lengths of the documents that are not empty, and all their UTF-8, from Arrow's buffers."""
    texts = batch.texts.drop_null() if batch.texts.null_count else batch.texts
    if len(texts) == 0:
        return np.zeros(0, dtype=np.int64), b""
    _, offset_buffer, text_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths = np.diff(offsets)
    lengths = lengths[lengths > 0]
    if len(lengths) and lengths.max() > MAX_DOCUMENT_BYTES:
        raise FileProblem(
            batch.file.path,
            f"holds a document of {lengths.max()} bytes; {MAX_DOCUMENT_BYTES} is the most one may have",
            "split it into several documents",
        )
    text = b"" if text_buffer is None else text_buffer[int(offsets[0]) : int(offsets[-1])].to_pybytes()
    return lengths, text
