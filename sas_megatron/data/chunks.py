"""Chunks of consecutive documents: the unit in which a corpus is encoded, verified and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # worker processes import this module and must not import pyarrow
    from sas_megatron.data.documents import TextBatch

# Small, because at the end of a corpus workers wait for the last chunk: 0.1 s at 1 million tokens/s.
CHUNK_BYTES = 1 << 19


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents that are not empty, as UTF-8 in one buffer."""

    index: int
    first_document: int  # number of documents with text in all previous chunks
    document_bytes: npt.NDArray[np.int64]  # [documents], length of each document
    text: bytes
    empty_documents: int  # number of empty documents left out since the previous chunk
    source_bytes_read: int

    @cached_property
    def digest(self) -> bytes:
        """The sha256 of the document lengths and texts."""
        digest = hashlib.sha256(self.document_bytes.astype("<i8").tobytes())
        digest.update(self.text)
        return digest.digest()

    def documents(self) -> list[bytes]:
        """Return each document as UTF-8."""
        ends = np.cumsum(self.document_bytes).tolist()
        starts = [0, *ends[:-1]]
        return [self.text[start:end] for start, end in zip(starts, ends, strict=True)]


def cut_chunks(batches: Iterable[TextBatch], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Split documents into chunks of at least `chunk_bytes`; a chunk ends with the document that reaches it.

    The boundaries depend only on the documents, not on the batches that they arrive in.
    """
    lengths: list[npt.NDArray[np.int64]] = []
    texts: list[bytes] = []
    size_bytes = empty_documents = source_bytes_read = index = first_document = 0

    def build_chunk() -> Chunk:
        return Chunk(
            index,
            first_document,
            np.concatenate(lengths),
            b"".join(texts),
            empty_documents,
            source_bytes_read,
        )

    for batch in batches:
        batch_lengths, batch_text = _lengths_and_text(batch)
        source_bytes_read = batch.source_bytes_read
        empty_documents += len(batch.texts) - len(batch_lengths)
        ends = np.cumsum(batch_lengths)
        row = start = 0
        while row < len(batch_lengths):
            # The document that reaches chunk_bytes is the last one of its chunk.
            last = int(np.searchsorted(ends, start + chunk_bytes - size_bytes))
            end_row = min(last + 1, len(batch_lengths))
            end = int(ends[end_row - 1])
            lengths.append(batch_lengths[row:end_row])
            texts.append(batch_text[start:end])
            size_bytes += end - start
            row, start = end_row, end
            if size_bytes >= chunk_bytes:
                yield build_chunk()
                first_document += sum(map(len, lengths))
                lengths, texts, size_bytes, empty_documents = [], [], 0, 0
                index += 1
    if lengths or empty_documents:
        lengths.append(np.zeros(0, dtype=np.int64))
        yield build_chunk()


def _lengths_and_text(batch: TextBatch) -> tuple[npt.NDArray[np.int64], bytes]:
    """Return the lengths of the documents that are not empty and their UTF-8, read from Arrow's buffers."""
    texts = batch.texts.drop_null() if batch.texts.null_count else batch.texts
    if len(texts) == 0:
        return np.zeros(0, dtype=np.int64), b""
    _, offset_buffer, text_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths = np.diff(offsets)
    lengths = lengths[lengths > 0]
    text = b"" if text_buffer is None else text_buffer[int(offsets[0]) : int(offsets[-1])].to_pybytes()
    return lengths, text
