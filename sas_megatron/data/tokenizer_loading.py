"""Load a tokenizer by the content of its file, or an encoding of tiktoken by its name.

A library is imported only for its own tokenizers: `tokenizers` and `tiktoken` are optional.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.data.tokenizer import Tokenizer

# The files of a tokenizer in a folder, of which the first is read.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")
TRAIN_ONE = "train one with `sas-megatron tokenizer train`"
INSTALL = "install it with `pip install 'sas-megatron[tokenizers]'`"


def load_tokenizer(location: str | Path, *, end_of_document: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        location: A sentencepiece .model file, a tokenizer.json, a Hugging Face folder that contains one of
            them, or the name of an encoding of tiktoken.
        end_of_document: Name of the special token after each document; None selects the tokenizer's own.

    Raises:
        FileProblem: The file is missing, damaged, or of a kind that is not supported.
        FieldError: The library or the files of an encoding are missing, or there is no such special token.
    """
    path = Path(location)
    if not os.path.exists(path):  # unlike Path.exists, it accepts any text
        return _load_by_name(str(location), end_of_document)
    if os.path.isdir(path):
        found = find_tokenizer(path)
        if found is None:
            raise FileProblem(
                path,
                f"is a folder without {' or '.join(TOKENIZER_FILES[:2])}",
                "name the file, or another folder",
            )
        path = location = found
    content = _read(path)
    if content.lstrip()[:1] == b"{":
        fields = _parse(path, content)
        if fields.get("format") == "tiktoken encoding":
            require_library("tiktoken", "tokenizer", location)
            from sas_megatron.data.tiktoken_tokenizer import TiktokenTokenizer, read_encoding

            return TiktokenTokenizer(location, read_encoding(path, fields), end_of_document=end_of_document)
        if "model" not in fields:
            raise FileProblem(path, "is JSON, but not a tokenizer.json", "name the file of the tokenizer")
        require_library("tokenizers", "tokenizer", location)
        from sas_megatron.data.json_tokenizer import SETTINGS_FILE, JsonTokenizer

        # Only a tokenizer.json has its own settings: other names may share a folder.
        settings = path.with_name(SETTINGS_FILE) if path.name == "tokenizer.json" else None
        return JsonTokenizer(
            location,
            content,
            settings=_read(settings) if settings is not None and settings.exists() else None,
            end_of_document=end_of_document,
        )
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
        raise FileProblem(
            path,
            "is a table of tiktoken ranks, which lacks the pattern and the special tokens",
            "use the tokenizer.json of the same model, or name a registered encoding such as cl100k_base",
        )
    from sas_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(location, content, end_of_document=end_of_document)


def tokenizer_exists(location: str | Path) -> bool:
    """Return whether there is such a path, or an encoding of tiktoken of this name."""
    return os.path.exists(location) or _is_encoding(str(location))


def find_tokenizer(folder: Path) -> Path | None:
    """Return the file of the tokenizer in a folder; None if there is none."""
    for name in TOKENIZER_FILES:
        if os.path.isfile(folder / name):
            return folder / name
    return None


def _load_by_name(name: str, end_of_document: str | None) -> Tokenizer:
    if _is_encoding(name):
        from sas_megatron.data.tiktoken_tokenizer import TiktokenTokenizer, open_encoding

        return TiktokenTokenizer(name, open_encoding(name), end_of_document=end_of_document)
    problem = "does not exist"
    if _may_be_encoding(name):
        problem += (
            ", and is not an encoding of tiktoken"
            if _is_installed("tiktoken")
            else f"; encodings of tiktoken by name need this library: {INSTALL}"
        )
    raise FileProblem(name, problem, TRAIN_ONE)


def _may_be_encoding(name: str) -> bool:
    return re.fullmatch(r"[\w-]+", name) is not None


def _is_encoding(name: str) -> bool:
    if not (_may_be_encoding(name) and _is_installed("tiktoken")):
        return False
    import tiktoken

    return name in tiktoken.list_encoding_names()


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def require_library(library: str, field: str, value: object) -> None:
    """Check that an optional library is installed.

    Raises:
        FieldError: It is not; the error names the field that needs it.
    """
    if not _is_installed(library):
        raise FieldError(field, value, f"needs the library {library}", INSTALL)


def _read(path: Path) -> bytes:
    with translate_os_errors(
        path,
        problem="cannot be read",
        remedy="name the file of a tokenizer",
        missing=("does not exist", TRAIN_ONE),
    ):
        return path.read_bytes()


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileProblem(path, f"is damaged JSON ({error})", f"copy it again, or {TRAIN_ONE}") from None
    return fields if isinstance(fields, dict) else {}
