"""The built-in corpus: the source of the Python standard library, about 31 MB that every machine has."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.io.files import make_folder, replace_file, write_file

BUILTIN_NAME = "builtin"
SCHEMA_VERSION = 1
ROW_GROUP_DOCUMENTS = 128


def default_cache_folder() -> Path:
    """`sas_megatron` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    configured = os.environ.get("XDG_CACHE_HOME")
    return (Path(configured) if configured else Path.home() / ".cache") / "sas_megatron"


def resolve_sources(sources: list[str]) -> list[str]:
    """The sources with the word `builtin` replaced by the path of the built-in corpus."""
    return [str(builtin_corpus()) if source == BUILTIN_NAME else source for source in sources]


def builtin_corpus(cache_folder: Path | None = None, *, max_bytes: int | None = None) -> Path:
    """The Parquet file of the built-in corpus (columns text and path), written on the first call.

    One document a file, in the order of a hash of its path, without installed packages and without the
    few test files that are not UTF-8. Beside it stands a JSON record with the sha256 of its contents.

    Args:
        cache_folder: where the file is kept; by default `default_cache_folder()`.
        max_bytes: leave out the files with which the text would grow beyond this; by default take all.

    Raises:
        FileProblem: the folder cannot be written, or the standard library has no source files here.
    """
    folder = default_cache_folder() if cache_folder is None else cache_folder
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
    """The sha256 over each document's path and text, each preceded by its length in bytes."""
    digest = hashlib.sha256()
    for path, text in zip(paths, texts, strict=True):
        for part in (path.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def hash_order(relative_path: str) -> str:
    """What the documents are sorted by; the same on every machine."""
    return hashlib.sha256(relative_path.encode()).hexdigest()


def _read_standard_library(max_bytes: int | None) -> tuple[list[str], list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # In the order of a hash: a split by documents, and the head of the corpus, are then fair samples.
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
            continue  # tests of the tokenizer module, in other encodings on purpose
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
            root, "holds no Python source to make the built-in corpus of", "name documents of your own"
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
