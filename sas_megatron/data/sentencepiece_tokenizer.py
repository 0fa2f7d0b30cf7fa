"""Tokenizers of sentencepiece: a .model file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from sas_megatron.config.errors import FileProblem
from sas_megatron.data.tokenizer import Tokenizer

# sentencepiece writes a space as U+2581, and decodes a literal U+2581 as a space.
SPACE_MARK = "\u2581"
SPACE_MARK_BYTES = SPACE_MARK.encode()
# A message appended to a serialized one is merged with it. This one is
# `normalizer_spec { add_dummy_prefix: false }`, fields 3 and 3 of sentencepiece_model.proto.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
TRAIN_ONE = "train one with `sas-megatron tokenizer train`"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with byte fallback.

    A literal U+2581, which sentencepiece does not distinguish from a space, is encoded as its three bytes.
    Models that `train_tokenizer` trains decode every text exactly. Others may add a space before each
    document, which is removed again, or normalize the text, which `round_trip` states.

    Raises:
        FileProblem: The content is not a sentencepiece model, or it has no byte fallback or no
            end-of-document token.
    """

    def __init__(self, location: str | Path, model: bytes, *, end_of_document: str | None = None) -> None:
        path = Path(location)
        self._processor = _load_processor(path, model)
        # Text after a literal U+2581 continues a document, and must get no space before it.
        adds_prefix = self._processor.encode(["a"], out_type=str)[0][:1] != ["a"]
        self._continuation = _load_processor(path, model + WITHOUT_PREFIX) if adds_prefix else self._processor
        number = range(self._processor.get_piece_size())
        try:
            token_bytes = [self._bytes_of(token) for token in number]
            special = {
                self._processor.id_to_piece(token): token
                for token in number
                if self._processor.is_control(token)
            }
        except ValueError as error:  # among them UnicodeDecodeError: a piece is not UTF-8
            raise _damaged(path) from error
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK_BYTES]
        eos_id = self._processor.eos_id()
        if eos_id < 0 and end_of_document is None:
            raise FileProblem(path, "has no end-of-document token", TRAIN_ONE)
        if not all(self._processor.is_byte(token) for token in self._space_mark_ids):
            raise FileProblem(path, "has no byte fallback, so that some texts cannot be encoded", TRAIN_ONE)
        super().__init__(
            location,
            files={"tokenizer.model": model},
            token_bytes=token_bytes,
            special_tokens=special,
            named_end=None if eos_id < 0 else self._processor.id_to_piece(eos_id),
            end_of_document=end_of_document,
        )

    def encode_documents(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode UTF-8 documents in one thread, without end-of-document tokens."""
        encoded = _encode(self._processor, list(documents))
        for index, document in enumerate(documents):
            if SPACE_MARK_BYTES in document:
                encoded[index] = self._encode_around_space_marks(document)
        return encoded

    def _bytes_of(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()

    def _encode_around_space_marks(self, document: bytes) -> npt.NDArray[np.int32]:
        mark = np.array(self._space_mark_ids, dtype=np.int32)
        first, *others = document.split(SPACE_MARK_BYTES)
        arrays = _encode(self._processor, [first])
        for tokens in _encode(self._continuation, others):
            arrays += [mark, tokens]
        return np.concatenate(arrays)


def _encode(
    processor: sentencepiece.SentencePieceProcessor, documents: list[bytes]
) -> list[npt.NDArray[np.int32]]:
    encoded: list[npt.NDArray[np.int32]] = processor.encode(documents, return_type="numpy", num_threads=1)
    return encoded


def _load_processor(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        if not model:  # sentencepiece accepts an empty file as a model without tokens
            raise RuntimeError("empty file")
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the message of an error may contain a damaged piece
        raise _damaged(path) from error


def _damaged(path: Path) -> FileProblem:
    return FileProblem(
        path, "is damaged, or is not a tokenizer that this program reads", f"copy it again, or {TRAIN_ONE}"
    )
