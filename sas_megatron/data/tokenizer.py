"""The interface of tokenizers: token ids, the bytes of each token, and what Megatron-core's datasets require.

    a file, a Hugging Face folder or the name of an encoding -> load_tokenizer -> Tokenizer

Each library has one subclass. `tokenizer_loading.load_tokenizer` selects it by the content of the file.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data.round_trip import EXACT, describe_changes

# The usual names of the token after a document, of a tokenizer that does not name one.
USUAL_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

# A larger id is damage, for which memory would be reserved. Published vocabularies have up to 2^18 tokens.
MAX_VOCABULARY = 1 << 22


def count_ids(path: Path, ids: Iterable[int]) -> int:
    """Return the largest token id plus one.

    Raises:
        FileProblem: There are no ids, or one is negative or too large.
    """
    smallest, largest = min(ids := list(ids), default=-1), max(ids, default=-1)
    if smallest < 0 or largest >= MAX_VOCABULARY:
        raise FileProblem(
            path,
            f"has token ids from {smallest} to {largest}",
            f"use a tokenizer with ids from 0 to at most {MAX_VOCABULARY - 1}",
        )
    return largest + 1


def check_all_bytes(path: Path, present: Iterable[int]) -> None:
    """Check that every byte of UTF-8 has a token, so that every text can be encoded.

    Args:
        path: The file of the tokenizer, for the message.
        present: The bytes that have a token.

    Raises:
        FileProblem: A byte has none.
    """
    # No UTF-8 text contains the other bytes.
    missing = sorted({*range(0xC0), *range(0xC2, 0xF5)}.difference(present))
    if missing:
        raise FileProblem(
            path,
            f"has no token for {len(missing)} bytes, such as 0x{missing[0]:02x}",
            "train it with the complete alphabet of bytes",
        )


class RefusedText(UserError):
    """A text that the library of a tokenizer cannot encode.

    Attributes:
        index: Its index among the texts that were passed together.
        reason: The message of the library.
    """

    def __init__(self, index: int, reason: str, text: str) -> None:
        self.index, self.reason, self.text = index, reason, text
        super().__init__(
            f"text {text[:40]!r}… ({len(text):,} characters): cannot be encoded ({reason}); split it"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, self.reason, self.text)


class Tokenizer(ABC):
    """Encodes texts as token ids, and returns the bytes of token ids.

    Names of special tokens in a text are encoded as text, so that documents cannot contain special tokens.

    Attributes:
        location: The path or the name of an encoding, as given.
        files: Contents by file name, from which `load_tokenizer` can build the tokenizer again.
        sha256: Hash of the file that determines the token ids, and of the end-of-document token if it is not
            the one that this file names.
        vocab_size: The largest token id plus one.
        special_tokens: Ids of the special tokens by name.
        eos_id, end_of_document: Id and name of the token after each document.
        adds_prefix: Whether each document is encoded as if a space preceded it, as by Llama 2's tokenizer.
        round_trip: `EXACT`, or what decoding changes in an encoded text.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        files: Mapping[str, bytes],
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[str, int],
        named_end: str | None,
        end_of_document: str | None,
    ) -> None:
        """Set the common attributes; a subclass can encode documents before it calls this.

        Args:
            location: The path or the name of an encoding.
            files: Contents by file name; the first one determines the token ids.
            token_bytes: The bytes of each token; none for special tokens and ids without a token.
            special_tokens: Ids of the special tokens by name.
            named_end: The end-of-document token that the first file names, if any.
            end_of_document: The end-of-document token that is used instead, if not None.

        Raises:
            FieldError: There is no such special token, or it is not known which one ends a document.
        """
        self.location = str(location)
        self.files = dict(files)
        self.vocab_size = len(token_bytes)
        self._token_bytes = token_bytes
        self.end_of_document = end_of_document or named_end or _find_usual_end(self.location, special_tokens)
        if self.end_of_document not in special_tokens:
            raise FieldError(
                "end_of_document",
                self.end_of_document,
                f"is not a special token of {location}",
                f"use one of {_list_some(special_tokens)}",
            )
        self.special_tokens = dict(special_tokens)
        self.eos_id = special_tokens[self.end_of_document]
        digest = hashlib.sha256(next(iter(self.files.values())))
        if self.end_of_document != named_end:
            digest.update(b"\0" + self.end_of_document.encode())
        self.sha256 = digest.hexdigest()
        self._byte_lengths = np.array([len(each) for each in token_bytes], dtype=np.int32)
        self.adds_prefix = self.decode_bytes(self.encode("a")) == b" a"
        self._prefix_lengths = np.array(
            [self.adds_prefix and each.startswith(b" ") for each in token_bytes], dtype=np.int32
        )
        self.round_trip = describe_changes(lambda text: self.decode(self.encode(text)))

    @abstractmethod
    def encode_documents(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode UTF-8 documents in one thread, without end-of-document tokens.

        Raises:
            RefusedText: The library cannot encode a document.
        """

    def encode_singly(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Call `encode_documents` for each document, to find the one that is refused.

        Raises:
            RefusedText: The library cannot encode a document.
        """
        encoded = []
        for index, document in enumerate(documents):
            try:
                encoded += self.encode_documents([document])
            except RefusedText as refused:
                raise RefusedText(index, refused.reason, refused.text) from None
        return encoded

    @property
    def is_exact(self) -> bool:
        """Whether decoding gives exactly the encoded text."""
        return self.round_trip == EXACT

    @property
    def absolute_location(self) -> str:
        """The absolute path, or the name of an encoding."""
        path = Path(self.location)
        return str(path.absolute()) if path.exists() else self.location

    def fits(self, vocab_size: int) -> bool:
        """Return whether a model with this vocabulary can be used with the tokenizer.

        A model may have more rows than the tokenizer has tokens; they are never trained nor predicted.
        """
        return self.vocab_size <= vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end-of-document token.

        Raises:
            UnicodeEncodeError: The text has an unpaired surrogate, which UTF-8 cannot represent.
            RefusedText: The library cannot encode the text.
        """
        tokens: list[int] = self.encode_documents([text.encode()])[0].tolist()
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of a document; invalid UTF-8, which a model may generate, becomes U+FFFD."""
        decoded = self.decode_bytes(tokens)
        if self.adds_prefix:
            decoded = decoded.removeprefix(b" ")
        return decoded.decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of token ids; special tokens such as end-of-document have no bytes.

        The space that a tokenizer with `adds_prefix` puts before a document is included.
        """
        return b"".join([self._token_bytes[token] for token in tokens])

    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Return the number of UTF-8 bytes of each token, int32 [vocab_size]; 0 for special tokens."""
        return self._byte_lengths

    def prefix_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Return the bytes of each token that are not of the text if it begins a document: 0 or 1.

        int32 [vocab_size]. They are 1 for tokens that begin with a space if the tokenizer adds one.
        """
        return self._prefix_lengths

    def count_bytes(
        self, tokens: npt.NDArray[np.integer[Any]], previous: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.int32]:
        """Return the number of bytes of the text of each token, int32 of the shape of `tokens`.

        A token after a special token, such as end-of-document, begins a text.

        Args:
            tokens: Token ids.
            previous: The token id before each of them.
        """
        begins = self._byte_lengths[previous] == 0
        counted: npt.NDArray[np.int32] = self._byte_lengths[tokens] - self._prefix_lengths[tokens] * begins
        return counted

    @property
    def token_dtype(self) -> np.dtype[np.uint16] | np.dtype[np.int32]:
        """Data type of stored tokens, as Megatron-core's DType.optimal_dtype: uint16 below 65500 tokens."""
        return np.dtype(np.uint16) if self.vocab_size < 65500 else np.dtype(np.int32)

    @property
    def eod(self) -> int:
        """The end-of-document token id, under Megatron-core's name."""
        return self.eos_id

    @property
    def eos(self) -> int:
        """The end-of-document token id, under Megatron-core's alternative name."""
        return self.eos_id

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """The values that Megatron-core hashes into the name of cached sample indices; not the path."""
        return OrderedDict([("class", type(self).__name__), ("sha256", self.sha256)])

    def tokenize(self, text: str) -> list[int]:
        """Call `encode`, under Megatron-core's name."""
        return self.encode(text)

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Call `decode`, under Megatron-core's name."""
        return self.decode(tokens)


def _find_usual_end(location: str, special_tokens: Mapping[str, int]) -> str:
    for name in USUAL_END_TOKENS:
        if name in special_tokens:
            return name
    raise FieldError(
        "end_of_document",
        "null",
        f"{location} does not name the special token that ends a document",
        f"use one of {_list_some(special_tokens)}"
        if special_tokens
        else "add a special token such as <|endoftext|> to the tokenizer",
    )


def _list_some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
