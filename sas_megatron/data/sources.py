"""The source files of a corpus: formats by file ending, sorted walks of folders, change detection."""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors
from sas_megatron.data.folders import NO_DOCUMENTS, has_no_documents, walk_folder

logger = logging.getLogger(__name__)


class DocumentFormat(enum.Enum):
    """File format of documents."""

    PARQUET = "Parquet"
    ARROW = "Arrow"
    JSON_LINES = "JSON lines"
    TEXT = "plain text"


FORMAT_OF_ENDING: dict[str, DocumentFormat] = {
    ".parquet": DocumentFormat.PARQUET,
    ".arrow": DocumentFormat.ARROW,
    ".arrows": DocumentFormat.ARROW,
    ".ipc": DocumentFormat.ARROW,
    ".feather": DocumentFormat.ARROW,
    ".jsonl": DocumentFormat.JSON_LINES,
    ".ndjson": DocumentFormat.JSON_LINES,
    ".json": DocumentFormat.JSON_LINES,
    ".txt": DocumentFormat.TEXT,
    ".text": DocumentFormat.TEXT,
    ".md": DocumentFormat.TEXT,
    ".rst": DocumentFormat.TEXT,
    ".tex": DocumentFormat.TEXT,
    ".py": DocumentFormat.TEXT,
}
# Parquet and Arrow compress inside the file; .gz and .zst are accepted for the other formats only.
COMPRESSIBLE = (DocumentFormat.JSON_LINES, DocumentFormat.TEXT)
# What is left out of a source, besides what `walk_folder` leaves out.
UNKNOWN_ENDING = "files of unknown endings"
ALREADY_TAKEN = "files named twice"
COMPRESSION_OF_ENDING = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class SourceFile:
    """A file of documents."""

    path: Path
    document_format: DocumentFormat
    compression: str | None  # "gzip", "zstd" or None, as pyarrow names them
    size_bytes: int
    modified_nanoseconds: int
    identity: tuple[int, int]  # device and inode number


def known_endings() -> str:
    """Return the supported file endings as one line for messages."""
    return ", ".join(FORMAT_OF_ENDING) + "; JSON lines and text also with .gz or .zst"


@dataclass(frozen=True)
class Source:
    """The files of a file or folder that a command names, and counts of what was left out, by kind."""

    path: Path
    files: tuple[SourceFile, ...]
    left_out: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(file.size_bytes for file in self.files)


def find_sources(sources: Sequence[str | Path], *, text_column: str = "text") -> list[Source]:
    """Find the files of `sources`; a folder is searched recursively, and its files are sorted by path.

    Links are followed. A file that several sources or links name is taken once. Hidden files and files of an
    unknown ending in a folder are left out, and so are JSON files without documents. Each kind that is left
    out is logged with its count, and so are the formats if a folder has several.

    Raises:
        FileProblem: A source is missing, unreadable, of an unknown ending, no regular file, or a folder
            without documents.
        UserError: `sources` is empty.
    """
    if not sources:
        raise UserError("sources: none given; name at least one file or folder of documents")
    taken: set[tuple[int, int]] = set()
    found = []
    for path in map(Path, sources):
        if os.path.isdir(path):
            files, left_out = _files_in_folder(path, text_column)
        else:
            files, left_out = [_named_file(path)], Counter()
        new = []
        for file in files:
            if file.identity in taken:
                left_out[ALREADY_TAKEN] += 1
            else:
                taken.add(file.identity)
                new.append(file)
        formats = Counter(file.document_format.value for file in new)
        if len(formats) > 1:
            logger.warning("%s: reads files of several formats: %s", path, _format_counts(formats))
        if left_out:
            logger.warning("%s: left out %s", path, _format_counts(left_out))
        found.append(Source(path, tuple(new), left_out))
    return found


def find_source_files(sources: Sequence[str | Path], *, text_column: str = "text") -> list[SourceFile]:
    """Return the files of `sources` in order.

    Raises:
        UserError: As in `find_sources`.
    """
    return [file for source in find_sources(sources, text_column=text_column) for file in source.files]


def fingerprint_files(files: Iterable[SourceFile]) -> str:
    """Return a sha256 of path, size and modification time of each file, to detect changed files."""
    digest = hashlib.sha256()
    for file in files:
        line = f"{file.path.absolute()}\0{file.size_bytes}\0{file.modified_nanoseconds}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _format_of(path: Path) -> tuple[DocumentFormat, str | None] | None:
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    compression = None
    if endings and endings[-1] in COMPRESSION_OF_ENDING:
        compression = COMPRESSION_OF_ENDING[endings.pop()]
    document_format = FORMAT_OF_ENDING.get(endings[-1]) if endings else None
    if document_format is None or (compression and document_format not in COMPRESSIBLE):
        return None
    return document_format, compression


def _named_file(path: Path) -> SourceFile:
    """Return a file that a command names.

    Raises:
        FileProblem: It is missing, unreadable, of an unknown ending or no regular file.
    """
    found = _format_of(path)
    if found is None and os.path.exists(path):
        raise FileProblem(
            path,
            f"has an unknown file ending ({path.suffix or 'none'})",
            f"known endings are {known_endings()}",
        )
    return _stat_file(path, found)


def _stat_file(path: Path, found: tuple[DocumentFormat, str | None] | None) -> SourceFile:
    missing = ("does not exist", "check the path")
    if path.is_symlink():
        missing = ("is a link to a file or folder that does not exist", "restore the target")
    with translate_os_errors(path, problem="cannot be read", remedy="check its permissions", missing=missing):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        # Reading a named pipe would wait for a writer forever.
        raise FileProblem(path, "is not a regular file", "write the documents to a file")
    if not os.access(path, os.R_OK):
        raise FileProblem(path, "cannot be read (permission denied)", "check its permissions")
    assert found is not None, "the caller checks the ending of an existing file"
    return SourceFile(
        path, found[0], found[1], status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino)
    )


def _files_in_folder(folder: Path, text_column: str) -> tuple[list[SourceFile], Counter[str]]:
    """Return the files of a folder, and counts of what is left out.

    Raises:
        FileProblem: A folder or file cannot be read, or no file has documents.
    """
    left_out: Counter[str] = Counter()
    known = []
    for path in walk_folder(folder, left_out):
        found = _format_of(path)
        if found is None and os.path.exists(path):  # a dangling link is an error
            left_out[UNKNOWN_ENDING] += 1
            continue
        file = _stat_file(path, found)
        if path.suffix.lower() == ".json" and has_no_documents(path, text_column):
            left_out[NO_DOCUMENTS] += 1
        else:
            known.append(file)
    if not known:
        counts = f" ({_format_counts(left_out)} were left out)" if left_out else ""
        raise FileProblem(folder, f"has no documents{counts}", f"known endings are {known_endings()}")
    return known, left_out


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())
