"""Encodings of the library tiktoken, by name, and the file in which a run keeps one."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.data.tokenizer import RefusedText, Tokenizer, check_all_bytes, count_ids

TIKTOKEN_FILE = "tokenizer.tiktoken"
FORMAT = "tiktoken encoding"


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken. The token ids are those of `encode_ordinary`; decoding is exact."""

    def __init__(
        self, location: str | Path, encoding: tiktoken.Encoding, *, end_of_document: str | None = None
    ) -> None:
        self._encoding = encoding
        special = encoding._special_tokens
        ids = [*encoding._mergeable_ranks.values(), *special.values()]
        token_bytes = [b""] * count_ids(Path(location), ids)
        # The library would abort a text with another byte.
        check_all_bytes(Path(location), (token[0] for token in encoding._mergeable_ranks if len(token) == 1))
        for token, token_id in encoding._mergeable_ranks.items():
            token_bytes[token_id] = token
        super().__init__(
            location,
            files={TIKTOKEN_FILE: _write_encoding(encoding)},
            token_bytes=token_bytes,
            special_tokens=special,
            named_end="<|endoftext|>" if "<|endoftext|>" in special else None,
            end_of_document=end_of_document,
        )

    def encode_documents(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode UTF-8 documents in one thread, without end-of-document tokens.

        Raises:
            RefusedText: The library cannot encode a document, such as one with a million spaces in a row.
        """
        encoded = []
        for index, document in enumerate(documents):
            text = document.decode()
            try:
                tokens = self._encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError as error:
                raise RefusedText(index, str(error), text) from error
            encoded.append(tokens.astype(np.int32))
        return encoded


def open_encoding(name: str) -> tiktoken.Encoding:
    """Return the encoding of a registered name.

    Raises:
        FieldError: A file of the encoding is neither in tiktoken's cache nor can be downloaded.
    """
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # that of requests is one
        url = getattr(getattr(error, "request", None), "url", None)
        if url is None:
            raise FieldError(
                "tokenizer", name, f"cannot be read ({error})", "set TIKTOKEN_CACHE_DIR to a readable folder"
            ) from error
        raise FieldError(
            "tokenizer",
            name,
            f"needs the file {url}, which cannot be downloaded here ({type(error).__name__})",
            "download it elsewhere, save it in a folder under the name "
            f"{hashlib.sha1(url.encode()).hexdigest()}, and set TIKTOKEN_CACHE_DIR to this folder",
        ) from error


def read_encoding(path: Path, fields: dict[str, Any]) -> tiktoken.Encoding:
    """Return the encoding of a file that a run or an export wrote.

    Raises:
        FileProblem: The file is damaged.
    """
    try:
        ranks = {base64.b64decode(token, validate=True): rank for rank, token in fields["mergeable_ranks"]}
        ids = [*ranks.values(), *fields["special_tokens"].values()]
        if len(set(ids)) < len(fields["mergeable_ranks"]) + len(fields["special_tokens"]):
            raise ValueError("it has two tokens with the same bytes or id")
        return tiktoken.Encoding(
            str(fields["name"]),
            pat_str=fields["pat_str"],
            mergeable_ranks=ranks,
            special_tokens=fields["special_tokens"],
        )
    except BaseException as error:  # the library raises several, and a PanicException, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FileProblem(path, f"is a damaged tiktoken encoding ({error})", "copy it again") from error


def _write_encoding(encoding: tiktoken.Encoding) -> bytes:
    ranks = encoding._mergeable_ranks.items()
    fields = {
        "format": FORMAT,
        "name": encoding.name,
        "pat_str": encoding._pat_str,
        "special_tokens": dict(sorted(encoding._special_tokens.items())),
        "mergeable_ranks": sorted((rank, base64.b64encode(token).decode()) for token, rank in ranks),
    }
    return (json.dumps(fields) + "\n").encode()
