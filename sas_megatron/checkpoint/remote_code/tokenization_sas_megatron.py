"""The tokenizer of a model that sas_megatron trained: the same sentencepiece model and token ids."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

# sentencepiece replaces spaces by this character. If it occurs in the text, it is encoded as the tokens of
# its three bytes, as in training.
SPACE_MARK = "\u2581"
# A message appended to a serialized one is merged with it: `normalizer_spec { add_dummy_prefix: false }`.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
SPACE_MARK_PIECES = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]


class SASMegatronTokenizer(PreTrainedTokenizer):
    """Encodes text as in training, and decodes tokens to exactly the same text.

    No tokens are added before or after a text. Names of control tokens in the text (`</s>`) are encoded as
    text, as in training, unless `split_special_tokens=False` is given.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  # required by transformers
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **options: Any) -> None:
        self.vocab_file = vocab_file
        model = Path(vocab_file).read_bytes()
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Text after a literal U+2581 continues the text, and gets no space before it.
        self.continuation = sentencepiece.SentencePieceProcessor(model_proto=model + WITHOUT_PREFIX)
        self.adds_prefix = self.processor.encode("a", out_type=str)[0][:1] == SPACE_MARK
        options.setdefault("split_special_tokens", True)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """The number of pieces of the sentencepiece model."""
        size: int = self.processor.get_piece_size()
        return size

    def get_vocab(self) -> dict[str, int]:
        """Return the token ids by piece."""
        return {self.processor.id_to_piece(token): token for token in range(self.vocab_size)}

    def _tokenize(self, text: str, **_options: Any) -> list[str]:
        first, *others = text.split(SPACE_MARK)
        pieces: list[str] = self.processor.encode(first, out_type=str)
        for part in others:
            pieces += SPACE_MARK_PIECES + self.continuation.encode(part, out_type=str)
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        found: int = self.processor.piece_to_id(token)
        return found

    def _convert_id_to_token(self, index: int) -> str:
        # The model may have more rows than the tokenizer has pieces.
        return str(self.processor.id_to_piece(index)) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces; bytes that are not valid UTF-8 become U+FFFD."""
        text = b"".join(map(self._bytes_of, tokens))
        return (text.removeprefix(b" ") if self.adds_prefix else text).decode("utf-8", errors="replace")

    def _bytes_of(self, piece: str) -> bytes:
        if self.processor.is_byte(self.processor.piece_to_id(piece)):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.replace(SPACE_MARK, " ").encode()

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the sentencepiece model."""
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
