"""The files a corpus is made of: formats by file ending, folders walked in order, changes noticed."""

from __future__ import annotations

import enum
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors

logger = logging.getLogger(__name__)


class DocumentFormat(enum.Enum):
    """How documents lie in a file."""

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
# Parquet and Arrow compress inside the file, so only these two come compressed as a whole.
COMPRESSIBLE = (DocumentFormat.JSON_LINES, DocumentFormat.TEXT)
COMPRESSION_OF_ENDING = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class SourceFile:
    """One file of documents."""

    path: Path
    document_format: DocumentFormat
    compression: str | None  # "gzip", "zstd" or None, as pyarrow names them
    size_bytes: int
    modified_nanoseconds: int


def known_endings() -> str:
    """The file endings that name a format, as one line for messages."""
    return ", ".join(FORMAT_OF_ENDING) + "; JSON lines and text also with .gz or .zst"


def find_source_files(sources: Sequence[str | Path]) -> list[SourceFile]:
    """The files of the named files and folders; a folder's recursively, sorted by their path in it.

    In a folder, hidden files and files of an unknown ending are passed over; how many is logged.

    Raises:
        FileProblem: a source is missing, unreadable, of an unknown ending, or a folder without documents.
        UserError: no source is named.
    """
    if not sources:
        raise UserError("sources: none is named; give at least one file or folder of documents")
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files.extend(_files_in_folder(path))
            continue
        found = _format_of(path)
        if found is None and path.exists():
            raise FileProblem(
                path,
                f"has an ending of no known format ({path.suffix or 'none'})",
                f"known are {known_endings()}",
            )
        files.append(_stat_file(path, found))
    return files


def fingerprint_files(files: Iterable[SourceFile]) -> str:
    """A sha256 over path, size and time of change of each file: equal while nobody touched them."""
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


def _stat_file(path: Path, found: tuple[DocumentFormat, str | None] | None) -> SourceFile:
    with translate_os_errors(
        path,
        problem="cannot be read",
        remedy="check its permissions",
        missing=("there is no such file or folder", "check the path"),
    ):
        status = path.stat()
    if not os.access(path, os.R_OK):
        raise FileProblem(path, "cannot be read (permission denied)", "check its permissions")
    assert found is not None, "a missing file is reported before its ending"
    return SourceFile(path, found[0], found[1], status.st_size, status.st_mtime_ns)


def _files_in_folder(folder: Path) -> list[SourceFile]:
    def report(error: OSError) -> None:
        with translate_os_errors(error.filename, problem="cannot be read", remedy="check its permissions"):
            raise error

    paths: list[Path] = []
    for parent, folder_names, file_names in os.walk(folder, onerror=report):
        folder_names[:] = [name for name in folder_names if not name.startswith(".")]
        paths.extend(Path(parent, name) for name in file_names if not name.startswith("."))
    # Sorted by their parts, so that the order is the same on every file system.
    paths.sort(key=lambda path: path.relative_to(folder).parts)
    known = [(path, found) for path in paths if (found := _format_of(path)) is not None]
    if len(known) < len(paths):
        logger.warning("%s: passed over %d files of unknown endings", folder, len(paths) - len(known))
    if not known:
        raise FileProblem(folder, "holds no documents", f"known endings are {known_endings()}")
    return [_stat_file(path, found) for path, found in known]
