"""The source files of a corpus: formats by file ending, sorted walks of folders, change detection."""

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
COMPRESSION_OF_ENDING = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class SourceFile:
    """A file of documents."""

    path: Path
    document_format: DocumentFormat
    compression: str | None  # "gzip", "zstd" or None, as pyarrow names them
    size_bytes: int
    modified_nanoseconds: int


def known_endings() -> str:
    """Return the supported file endings as one line for messages."""
    return ", ".join(FORMAT_OF_ENDING) + "; JSON lines and text also with .gz or .zst"


def find_source_files(sources: Sequence[str | Path]) -> list[SourceFile]:
    """Return the files of `sources`; a folder is searched recursively, and its files are sorted by path.

    In a folder, hidden files and files of an unknown ending are skipped; the number of the latter is logged.

    Raises:
        FileProblem: A source is missing, unreadable, of an unknown ending, or a folder without documents.
        UserError: `sources` is empty.
    """
    if not sources:
        raise UserError("sources: none given; name at least one file or folder of documents")
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
                f"has an unknown file ending ({path.suffix or 'none'})",
                f"known endings are {known_endings()}",
            )
        files.append(_stat_file(path, found))
    return files


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


def _stat_file(path: Path, found: tuple[DocumentFormat, str | None] | None) -> SourceFile:
    with translate_os_errors(
        path,
        problem="cannot be read",
        remedy="check its permissions",
        missing=("does not exist", "check the path"),
    ):
        status = path.stat()
    if not os.access(path, os.R_OK):
        raise FileProblem(path, "cannot be read (permission denied)", "check its permissions")
    assert found is not None, "the caller checks the ending of an existing file"
    return SourceFile(path, found[0], found[1], status.st_size, status.st_mtime_ns)


def _files_in_folder(folder: Path) -> list[SourceFile]:
    def report(error: OSError) -> None:
        with translate_os_errors(error.filename, problem="cannot be read", remedy="check its permissions"):
            raise error

    paths: list[Path] = []
    for parent, folder_names, file_names in os.walk(folder, onerror=report):
        folder_names[:] = [name for name in folder_names if not name.startswith(".")]
        paths.extend(Path(parent, name) for name in file_names if not name.startswith("."))
    # Sort by path components, so that the order is the same on every file system.
    paths.sort(key=lambda path: path.relative_to(folder).parts)
    known = [(path, found) for path in paths if (found := _format_of(path)) is not None]
    if len(known) < len(paths):
        logger.warning("%s: skipped %d files of unknown endings", folder, len(paths) - len(known))
    if not known:
        raise FileProblem(folder, "has no documents", f"known endings are {known_endings()}")
    return [_stat_file(path, found) for path, found in known]
