"""The built-in corpus: the source code of the Python standard library, about 31 MB on every machine."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.io.files import make_folder, replace_file, user_cache_folder, write_file

logger = logging.getLogger(__name__)

BUILTIN_NAME = "builtin"
# Version 2 added what is left out.
SCHEMA_VERSION = 2
ROW_GROUP_DOCUMENTS = 128


def resolve_sources(sources: list[str]) -> list[str]:
    """Return the sources with the word `builtin` replaced by the path of the built-in corpus.

    Source files that the corpus leaves out are logged.

    Raises:
        FileProblem: The built-in corpus cannot be written.
    """
    if BUILTIN_NAME not in sources:
        return sources
    corpus = builtin_corpus()
    left_out = json.loads(_record_path(corpus).read_text(encoding="utf-8"))["left_out"]
    if left_out:
        counts = ", ".join(f"{kind} ({count:,})" for kind, count in left_out.items())
        logger.warning("%s: left out %s", BUILTIN_NAME, counts)
    return [str(corpus) if source == BUILTIN_NAME else source for source in sources]


def builtin_corpus(cache_folder: Path | None = None, *, max_bytes: int | None = None) -> Path:
    """Return the Parquet file of the built-in corpus (columns text and path); the first call writes it.

    Each source file is one document, ordered by a hash of its path. Installed packages and the few test files
    that are not UTF-8 are left out. A JSON record in the same folder holds the sha256 of the contents, and
    counts of the files that are left out.

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
    texts, paths, left_out = _read_standard_library(max_bytes)
    record = {
        "schema_version": SCHEMA_VERSION,
        "num_documents": len(texts),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "sha256": hash_documents(paths, texts),
        "parquet_bytes": 0,
        "left_out": left_out,
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


def _read_standard_library(max_bytes: int | None) -> tuple[list[str], list[str], Counter[str]]:
    """Return texts and paths of the source files, and counts of those that are left out.

    Raises:
        FileProblem: This Python has no source files of the standard library.
    """
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
    left_out: Counter[str] = Counter()
    remaining_bytes = max_bytes
    for relative_path in relative_paths:
        try:
            text = (root / relative_path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            left_out["files that are not UTF-8"] += 1  # of the tests of Python's tokenizer
            continue
        if not text:
            left_out["empty files"] += 1
            continue
        if remaining_bytes is not None:
            size = len(text.encode())
            if size > remaining_bytes:
                left_out["files beyond the size limit"] += 1
                continue
            remaining_bytes -= size
        texts.append(text)
        paths.append(relative_path)
    if not texts:
        raise FileProblem(
            root, "has no Python source files for the built-in corpus", "name documents of your own"
        )
    return texts, paths, left_out


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
