"""Stream documents from files in bounded memory.

    files and folders -> SourceFile -> TextBatch (an Arrow array of texts, about 1 MiB) -> str

An Arrow array holds the texts of a batch in one buffer. Later stages hash and split this buffer and send it
to other processes without creating a Python string for each document.
"""

from __future__ import annotations

import functools
import io
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data.sources import DocumentFormat, SourceFile, find_source_files
from sas_megatron.data.text_columns import convert_to_texts, find_text_column, find_value

BATCH_BYTES = 1 << 20
# Arrow raises ArrowInvalid, OSError or a built-in exception for damaged data, depending on the format and the
# place: a column name that is not UTF-8 is a UnicodeDecodeError, for example, and a lost column a KeyError.
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError, OverflowError)
MAX_ROWS_PER_BATCH = 8192
# Default limit of a document: sentencepiece needs about thirty times as much memory.
DEFAULT_MAX_DOCUMENT_BYTES = 1 << 27


@dataclass(frozen=True)
class TextBatch:
    """Consecutive documents of one file."""

    texts: pa.LargeStringArray  # valid UTF-8; null for a row without text
    file: SourceFile
    source_bytes_read: int  # bytes on disk of all files read so far; an estimate for progress reports


class Documents:
    """Iterates over every document that is not empty, and counts the empty ones of the last iteration.

    Files are read in the given order, which `find_source_files` sorts by path within a folder.

    Args:
        files: The files.
        text_column: The column or field of the text.
        max_document_bytes: The largest document that is read.

    Raises:
        FileProblem: While iterating: a file is missing, damaged or not UTF-8.
        FieldError: While iterating: a file has no text column, or the column is not of strings, or a document
            is too large.
        UserError: While iterating: the files have no documents, or only empty ones.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        *,
        text_column: str = "text",
        max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    ) -> None:
        self.num_empty = 0
        self._max_document_bytes = max_document_bytes
        self._files = files
        self._text_column = text_column

    def __iter__(self) -> Iterator[str]:
        num_documents = num_empty = 0
        for batch in stream_text_batches(
            self._files, text_column=self._text_column, max_document_bytes=self._max_document_bytes
        ):
            for text in batch.texts.to_pylist():
                if text:
                    num_documents += 1
                    yield text
                else:
                    num_empty += 1
        self.num_empty = num_empty
        if num_documents == 0:
            raise empty_corpus([file.path for file in self._files])


def stream_documents(
    sources: Sequence[str | Path],
    *,
    text_column: str = "text",
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
) -> Documents:
    """Return the documents of files and folders.

    Raises:
        UserError: As in `find_sources`.
    """
    files = find_source_files(sources, text_column=text_column)
    return Documents(files, text_column=text_column, max_document_bytes=max_document_bytes)


def empty_corpus(sources: Sequence[str | Path]) -> UserError:
    """Return the error for sources without any document that has text."""
    names = ", ".join(str(source) for source in sources[:3])
    more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    return UserError(
        f"sources={names}{more}: have no documents, or only empty ones; name files with text in them"
    )


def stream_text_batches(
    files: Sequence[SourceFile],
    *,
    text_column: str = "text",
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
) -> Iterator[TextBatch]:
    """Yield the texts of the files in order, in batches of about 1 MiB.

    Raises:
        FileProblem: A file is missing, damaged or not UTF-8.
        FieldError: A file has no text column, or the column is not of strings, or a document is too large.
    """
    bytes_before = 0
    for file in files:
        reader = _READERS[file.document_format]
        try:
            for texts, share_read in reader(file, text_column, max_document_bytes):
                if (pc.max(pc.binary_length(texts)).as_py() or 0) > max_document_bytes:
                    raise _too_large(file.path, max_document_bytes)
                yield TextBatch(texts, file, bytes_before + int(share_read * file.size_bytes))
        except UserError:
            raise
        except FileNotFoundError as error:
            raise FileProblem(file.path, "does not exist", "check the path") from error
        except DAMAGE as error:
            raise FileProblem(
                file.path,
                f"cannot be read as {file.document_format.value}: it is damaged or truncated "
                f"({_first_line(error)})",
                "write or download it again",
            ) from error
        bytes_before += file.size_bytes


def _too_large(where: str | Path, max_document_bytes: int) -> FieldError:
    return FieldError(
        "max_document_bytes",
        max_document_bytes,
        f"{where} has a larger document",
        "split it into several documents, or raise this limit",
    )


def _read_parquet(
    file: SourceFile, text_column: str, max_document_bytes: int
) -> Iterator[tuple[pa.LargeStringArray, float]]:
    # Use a buffered stream; otherwise Arrow reads an entire column chunk, possibly the entire file, at once.
    with (
        open(file.path, "rb") as raw,
        pq.ParquetFile(raw, buffer_size=BATCH_BYTES, pre_buffer=False) as parquet,
    ):
        names = find_text_column(parquet.schema_arrow, text_column, file.path)
        num_rows = parquet.metadata.num_rows
        rows_per_batch, average_bytes = _rows_per_batch(parquet.metadata)
        # Refuse it before it is decompressed; headers and a dictionary of the column take less than a batch.
        if parquet.metadata.num_columns == 1 and average_bytes > max_document_bytes + BATCH_BYTES:
            raise _too_large(file.path, max_document_bytes)
        rows_read = 0
        for batch in parquet.iter_batches(rows_per_batch, columns=[".".join(names)], use_threads=False):
            column = batch.column(names[0])
            texts = convert_to_texts(column, names, path=file.path, first_row=rows_read)
            rows_read += batch.num_rows
            yield texts, rows_read / max(num_rows, 1)


def _rows_per_batch(metadata: pq.FileMetaData) -> tuple[int, int]:
    """Return the rows of about `BATCH_BYTES` and the average bytes of a row, all columns included.

    The sizes of a single column would be more exact, but pyarrow 26 aborts the process if they are damaged.
    """
    total_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    average_bytes = max(1, total_bytes // max(1, metadata.num_rows))
    return int(max(1, min(MAX_ROWS_PER_BATCH, BATCH_BYTES // average_bytes))), average_bytes


def _read_arrow(
    file: SourceFile, text_column: str, max_document_bytes: int
) -> Iterator[tuple[pa.LargeStringArray, float]]:
    with open(file.path, "rb") as raw:
        mapped = pa.BufferReader(pa.py_buffer(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)))
    start = mapped.read(6)
    mapped.seek(0)
    if start[:4] == b"FEA1":
        raise FileProblem(file.path, "is a Feather file of version 1", "convert it to version 2 (Arrow IPC)")
    if start == b"ARROW1":
        reader = pa.ipc.open_file(mapped)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        reader = pa.ipc.open_stream(mapped)
        batches = iter(reader)
    names = find_text_column(reader.schema, text_column, file.path)
    first_row = 0
    for batch in batches:
        column = batch.column(names[0])
        column.validate()  # before `nbytes` reads its offsets
        # One batch may hold the entire file, so convert slices, which share its memory.
        rows = max(1, min(MAX_ROWS_PER_BATCH, BATCH_BYTES * len(column) // max(1, column.nbytes)))
        if pa.types.is_dictionary(column.type):  # each row becomes a copy of an entry
            entry_bytes = _largest_entry(column.dictionary)
            if entry_bytes > max_document_bytes:
                raise _too_large(file.path, max_document_bytes)
            rows = max(1, min(rows, BATCH_BYTES // max(1, entry_bytes)))
        for row in range(0, len(column), rows):
            texts = convert_to_texts(
                column.slice(row, rows), names, path=file.path, first_row=first_row + row
            )
            yield texts, mapped.tell() / file.size_bytes
        first_row += len(column)


def _largest_entry(dictionary: pa.Array) -> int:
    """Return the bytes of the largest entry; 0 for types whose lengths Arrow does not compute."""
    is_counted = (
        *(pa.types.is_string, pa.types.is_large_string),
        *(pa.types.is_binary, pa.types.is_large_binary),
    )
    if not any(is_type(dictionary.type) for is_type in is_counted):
        return 0
    dictionary.validate()
    return int(pc.max(pc.binary_length(dictionary)).as_py() or 0)


def _read_json_lines(
    file: SourceFile, text_column: str, max_document_bytes: int
) -> Iterator[tuple[pa.LargeStringArray, float]]:
    # Parse line by line with the json module instead of pyarrow.json, which derives the schema from the first
    # block, fails when another field changes its type later, limits the line length and names no line.
    texts: list[str | None] = []
    texts_bytes = offset = 0
    with open(file.path, "rb", buffering=0) as raw, _open_lines(file, raw) as lines:
        read_line = functools.partial(lines.readline, max_document_bytes + 1)
        for line_number, line in enumerate(iter(read_line, b""), start=1):
            if len(line) > max_document_bytes:
                raise _too_large(f"{file.path}, line {line_number}", max_document_bytes)
            stripped = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
            if stripped.strip():
                text = _text_of_line(_decode(stripped, file, offset), file, line_number, text_column)
                texts.append(text)
                texts_bytes += len(line)
            offset += len(line)
            if texts_bytes >= BATCH_BYTES or len(texts) >= MAX_ROWS_PER_BATCH:
                yield pa.array(texts, pa.large_string()), raw.tell() / file.size_bytes
                texts, texts_bytes = [], 0
    yield pa.array(texts, pa.large_string()), 1.0


def _text_of_line(line: str, file: SourceFile, line_number: int, text_column: str) -> str | None:
    where = f"{file.path}, line {line_number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileProblem(
            where,
            f"is not JSON ({error})",
            "JSON Lines files have one complete object per line; fix or remove the line",
        ) from error
    if not isinstance(row, dict):
        raise FileProblem(
            where, f"is a {type(row).__name__}, not an object", 'write {"text": "…"} on each line'
        )
    try:
        text = find_value(row, text_column)
    except KeyError:
        raise FieldError(
            "text_column",
            text_column,
            f"{where} has no such column; its columns are {', '.join(row) or 'none'}",
            "name the column with the text",
        ) from None
    if text is None:
        return None
    if not isinstance(text, str):
        raise FieldError(
            "text_column",
            text_column,
            f"is of type {type(text).__name__} in {where}, not string",
            "name a column of strings",
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FileProblem(
                where,
                f"has an unpaired surrogate ({error.object[error.start]!r}) at character {error.start} of "
                "the text, counted from 0",
                "fix or remove the line",
            ) from error
    return text


def _read_text(
    file: SourceFile, text_column: str, max_document_bytes: int
) -> Iterator[tuple[pa.LargeStringArray, float]]:
    del text_column  # a text file is one document and has no columns
    with open(file.path, "rb", buffering=0) as raw, _open_lines(file, raw) as stream:
        content = stream.read(max_document_bytes + 1)
        if len(content) > max_document_bytes:
            raise _too_large(file.path, max_document_bytes)
        yield pa.array([_decode(content, file, 0)], pa.large_string()), 1.0


def _open_lines(file: SourceFile, raw: io.RawIOBase) -> io.BufferedReader:
    stream = raw if file.compression is None else pa.CompressedInputStream(raw, file.compression)
    return io.BufferedReader(stream, buffer_size=BATCH_BYTES)


def _decode(data: bytes, file: SourceFile, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        within = " of the uncompressed text" if file.compression else ""
        raise FileProblem(
            file.path,
            f"has bytes that are not UTF-8 at byte offset {offset + error.start}{within} "
            f"(0x{data[error.start]:02x})",
            "convert it to UTF-8",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS = {
    DocumentFormat.PARQUET: _read_parquet,
    DocumentFormat.ARROW: _read_arrow,
    DocumentFormat.JSON_LINES: _read_json_lines,
    DocumentFormat.TEXT: _read_text,
}
