"""The sentencepiece tokenizer, with the interface that Megatron-core's datasets require.

It reproduces every text exactly.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from sas_megatron.config.errors import FileProblem, translate_os_errors

# sentencepiece writes a space as U+2581, and decodes a literal U+2581 as a space.
SPACE_MARK = "\u2581"
SPACE_MARK_BYTES = SPACE_MARK.encode()
TRAIN_ONE = "train one with `sas-megatron tokenizer train`"
# A text that a tokenizer with normalization does not reproduce.
PROBE = " a  b\t\r\nc\u00a0\ufb01e\u0301\0\U0001f600 "


class Tokenizer:
    """A sentencepiece model whose `decode` returns exactly the text that was passed to `encode`.

    The model must not change the text (identity normalization, no added or removed spaces) and must have byte
    fallback; `train_tokenizer` trains such models. A literal U+2581, which sentencepiece does not distinguish
    from a space, is encoded as its three bytes.

    Raises:
        FileProblem: The file is missing, is not a sentencepiece model, or is not reversible.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        model = _read_model(self.path)
        self._processor = _load_processor(self.path, model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()
        try:
            self._token_bytes = [self._bytes_of(token) for token in range(self.vocab_size)]
        except ValueError as error:  # among them UnicodeDecodeError: a piece is not UTF-8
            raise _damaged(self.path) from error
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK_BYTES]
        self._check_reversible()

    def fits(self, vocab_size: int) -> bool:
        """Return whether a model with this vocabulary can be used with the tokenizer.

        A model may have more rows than the tokenizer has tokens; they are never trained nor predicted.
        """
        return self.vocab_size <= vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end-of-document token.

        Raises:
            UnicodeEncodeError: The text has an unpaired surrogate, which UTF-8 cannot represent.
        """
        tokens: list[int] = self.encode_documents([text.encode()])[0].tolist()
        return tokens

    def encode_documents(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode UTF-8 documents in one thread, without end-of-document tokens."""
        encoded: list[npt.NDArray[np.int32]] = self._processor.encode(
            list(documents), return_type="numpy", num_threads=1
        )
        for index, document in enumerate(documents):
            if SPACE_MARK_BYTES in document:
                encoded[index] = self._encode_around_space_marks(document)
        return encoded

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids; invalid UTF-8, which a model may generate, becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of token ids; control tokens such as end-of-document have no bytes."""
        return b"".join([self._token_bytes[token] for token in tokens])

    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Return the number of UTF-8 bytes of each token, int32 [vocab_size]; 0 for control tokens."""
        return np.array([len(token_bytes) for token_bytes in self._token_bytes], dtype=np.int32)

    def piece(self, token: int) -> str:
        """Return a token's name in the sentencepiece model, such as `</s>`."""
        name: str = self._processor.id_to_piece(token)
        return name

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

    def _bytes_of(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()

    def _encode_around_space_marks(self, document: bytes) -> npt.NDArray[np.int32]:
        mark = np.array(self._space_mark_ids, dtype=np.int32)
        between = self._processor.encode(document.split(SPACE_MARK_BYTES), return_type="numpy", num_threads=1)
        arrays = [between[0]]
        for tokens in between[1:]:
            arrays += [mark, tokens]
        return np.concatenate(arrays)

    def _check_reversible(self) -> None:
        if self.eos_id < 0:
            raise FileProblem(self.path, "has no end-of-document token", TRAIN_ONE)
        if not all(self._processor.is_byte(token) for token in self._space_mark_ids):
            raise FileProblem(
                self.path, "has no byte fallback, so that some texts cannot be encoded", TRAIN_ONE
            )
        probe = PROBE + SPACE_MARK
        if self.decode(self.encode(probe)) != probe:
            raise FileProblem(
                self.path,
                "does not reproduce the text that it encodes (it normalizes or drops characters)",
                TRAIN_ONE,
            )


def _read_model(path: Path) -> bytes:
    with translate_os_errors(
        path,
        problem="cannot be read",
        remedy="name a sentencepiece .model file",
        missing=("does not exist", TRAIN_ONE),
    ):
        return path.read_bytes()


def _load_processor(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        if not model:  # sentencepiece accepts an empty file as a model without tokens
            raise RuntimeError("empty file")
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the message of an error may contain a damaged piece
        raise _damaged(path) from error


def _damaged(path: Path) -> FileProblem:
    return FileProblem(path, "is damaged, or is not a sentencepiece model", f"copy it again, or {TRAIN_ONE}")
