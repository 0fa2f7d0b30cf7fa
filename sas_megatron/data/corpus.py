"""The built-in corpus: the source code of the Python standard library, about 31 MB on every machine."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.io.files import make_folder, replace_file, user_cache_folder, write_file

BUILTIN_NAME = "builtin"
SCHEMA_VERSION = 1
ROW_GROUP_DOCUMENTS = 128


def resolve_sources(sources: list[str]) -> list[str]:
    """Return the sources with the word `builtin` replaced by the path of the built-in corpus.

    Raises:
        FileProblem: The built-in corpus cannot be written.
    """
    return [str(builtin_corpus()) if source == BUILTIN_NAME else source for source in sources]


def builtin_corpus(cache_folder: Path | None = None, *, max_bytes: int | None = None) -> Path:
    """Return the Parquet file of the built-in corpus (columns text and path); the first call writes it.

    Each source file is one document, ordered by a hash of its path. Installed packages and the few test files
    that are not UTF-8 are left out. A JSON record in the same folder holds the sha256 of the contents.

    Args:
        cache_folder: Folder of the file; by default `user_cache_folder()`.
        max_bytes: Skip each file that would make the text larger than this; by default skip none.

    Raises:
        FileProblem: The folder cannot be written, or this Python has no source files of the standard library.
    """
    folder = user_cache_folder() if cache_folder is None else cache_folder
    part = "" if max_bytes is None else f"-{max_bytes}"
    path = (
        folder
        / f"python-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}{part}.parquet"
    )
    if _is_complete(path):
        return path
    texts, paths = _read_standard_library(max_bytes)
    record = {
        "schema_version": SCHEMA_VERSION,
        "num_documents": len(texts),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "sha256": hash_documents(paths, texts),
        "parquet_bytes": 0,
    }
    remedy = "set XDG_CACHE_HOME to a writable folder"
    with translate_os_errors(path, problem="cannot be written", remedy=remedy):
        make_folder(folder)
        with replace_file(path) as temporary:
            pq.write_table(
                pa.table({"text": texts, "path": paths}), temporary, row_group_size=ROW_GROUP_DOCUMENTS
            )
            record["parquet_bytes"] = temporary.stat().st_size
        write_file(_record_path(path), json.dumps(record, indent=2) + "\n")
    return path


def hash_documents(paths: list[str], texts: list[str]) -> str:
    """Return the sha256 of each document's path and text, each preceded by its length in bytes."""
    digest = hashlib.sha256()
    for path, text in zip(paths, texts, strict=True):
        for part in (path.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def hash_order(relative_path: str) -> str:
    """Return the sort key of a document, which is the same on every machine."""
    return hashlib.sha256(relative_path.encode()).hexdigest()


def _read_standard_library(max_bytes: int | None) -> tuple[list[str], list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # Ordered by a hash, so that a split by documents and the first documents are unbiased samples.
    relative_paths = sorted(
        (
            path.as_posix()
            for path in (found.relative_to(root) for found in root.rglob("*.py"))
            if path.parts[0] not in ("site-packages", "dist-packages")
        ),
        key=hash_order,
    )
    texts: list[str] = []
    paths: list[str] = []
    remaining_bytes = max_bytes
    for relative_path in relative_paths:
        try:
            text = (root / relative_path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # test files of Python's tokenizer in other encodings
        if not text:
            continue
        if remaining_bytes is not None:
            size = len(text.encode())
            if size > remaining_bytes:
                continue
            remaining_bytes -= size
        texts.append(text)
        paths.append(relative_path)
    if not texts:
        raise FileProblem(
            root, "has no Python source files for the built-in corpus", "name documents of your own"
        )
    return texts, paths


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _is_complete(path: Path) -> bool:
    try:
        record: dict[str, Any] = json.loads(_record_path(path).read_text(encoding="utf-8"))
        return bool(
            record["schema_version"] == SCHEMA_VERSION and path.stat().st_size == record["parquet_bytes"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
