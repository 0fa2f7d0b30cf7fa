"""The tokenizer of a model that sas_megatron trained with an encoding of tiktoken: the same token ids."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer


class SASMegatronTiktokenTokenizer(PreTrainedTokenizer):
    """Encodes text as in training, and decodes tokens to exactly the same text.

    No tokens are added before or after a text. Names of special tokens in the text are encoded as text, as in
    training, unless `split_special_tokens=False` is given. A token is written as the Latin-1 characters of
    its bytes, so that every token has a name.
    """

    vocab_files_names = {"vocab_file": "tokenizer.tiktoken"}  # noqa: RUF012  # required by transformers
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **options: Any) -> None:
        self.vocab_file = vocab_file
        fields = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        self.encoding = tiktoken.Encoding(
            fields["name"],
            pat_str=fields["pat_str"],
            mergeable_ranks={base64.b64decode(token): rank for rank, token in fields["mergeable_ranks"]},
            special_tokens=fields["special_tokens"],
        )
        self._ids = {
            base64.b64decode(token).decode("latin-1"): rank for rank, token in fields["mergeable_ranks"]
        }
        self._ids |= fields["special_tokens"]
        self._names = {token_id: name for name, token_id in self._ids.items()}
        options.setdefault("split_special_tokens", True)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one."""
        size: int = self.encoding.n_vocab
        return size

    def get_vocab(self) -> dict[str, int]:
        """Return the token ids by name."""
        return dict(self._ids)

    def _tokenize(self, text: str, **_options: Any) -> list[str]:
        return [self._names[token] for token in self.encoding.encode_ordinary(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        # The model may have more rows than the encoding has tokens.
        return self._names.get(index, "")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return "".join(tokens).encode("latin-1", errors="ignore").decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the file of the encoding."""
        name = f"{filename_prefix}-tokenizer.tiktoken" if filename_prefix else "tokenizer.tiktoken"
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
