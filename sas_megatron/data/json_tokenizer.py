"""Tokenizers of the Hugging Face library `tokenizers`: a tokenizer.json file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from sas_megatron.config.errors import FileProblem
from sas_megatron.data.sentencepiece_tokenizer import SPACE_MARK
from sas_megatron.data.tokenizer import RefusedText, Tokenizer, check_all_bytes, count_ids

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"


class JsonTokenizer(Tokenizer):
    """A tokenizer.json with a BPE or unigram model whose tokens have known bytes.

    Tokens are byte-level, as GPT-2's, or have byte fallback, as Llama 2's. The token ids are those of the
    library without special tokens before or after the text.

    Raises:
        FileProblem: The content is damaged, or has a model of another kind.
    """

    def __init__(
        self,
        location: str | Path,
        content: bytes,
        *,
        settings: bytes | None = None,
        end_of_document: str | None = None,
    ) -> None:
        """Build the tokenizer.

        Args:
            location: The path, for messages.
            content: Content of tokenizer.json.
            settings: Content of the tokenizer_config.json beside it, which may name `eos_token`.
            end_of_document: The special token that ends a document, if it is not that one.
        """
        path = Path(location)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            # Settings that the file may contain; documents must not be cut.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True
            fields = json.loads(content)
            added = {token["id"]: token for token in fields.get("added_tokens") or []}
            token_bytes = _list_token_bytes(path, fields, self._tokenizer.get_vocab(), added)
        except FileProblem:
            raise
        except Exception as error:  # the library raises Exception itself
            raise FileProblem(
                path, f"is not a tokenizer.json ({error})", "copy it from the folder of the model again"
            ) from error
        super().__init__(
            location,
            files={TOKENIZER_FILE: content} | ({} if settings is None else {SETTINGS_FILE: settings}),
            token_bytes=token_bytes,
            special_tokens={token["content"]: id for id, token in added.items() if token["special"]},
            named_end=None,
            end_of_document=end_of_document or _read_end(path, settings),
        )

    def encode_documents(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode UTF-8 documents without end-of-document tokens.

        The library uses one thread for each CPU, unless TOKENIZERS_PARALLELISM is false.

        Raises:
            RefusedText: The library cannot encode a document.
        """
        texts = [document.decode() for document in documents]
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(each.ids, dtype=np.int32) for each in encoded]
        except Exception as error:  # the library raises Exception itself
            if len(documents) == 1:
                raise RefusedText(0, str(error), texts[0]) from error
        return self.encode_singly(documents)


def _read_end(path: Path, settings: bytes | None) -> str | None:
    """Return the name of the end-of-document token in a tokenizer_config.json."""
    if settings is None:
        return None
    try:
        token = json.loads(settings).get("eos_token")
        return str(token["content"]) if isinstance(token, dict) else token and str(token)
    except (ValueError, KeyError, AttributeError) as error:
        raise FileProblem(
            path.with_name(SETTINGS_FILE), f"is damaged ({error})", "copy it again, or remove it"
        ) from error


def _list_token_bytes(
    path: Path, fields: Mapping[str, Any], vocabulary: Mapping[str, int], added: Mapping[int, Any]
) -> list[bytes]:
    """Return the bytes of each token id; none for special tokens, and for ids without a token.

    Raises:
        FileProblem: Tokens have no known bytes, some bytes have no token, or encoding is random.
    """
    model = fields["model"]
    if model.get("dropout"):
        raise FileProblem(
            path,
            f"encodes a text differently each time (model.dropout={model['dropout']})",
            "set model.dropout to null",
        )
    kinds = {
        step["type"]
        for part in ("normalizer", "pre_tokenizer", "decoder")
        for step in _steps(fields.get(part))
    }
    token_bytes = [b""] * count_ids(path, vocabulary.values())
    if "ByteLevel" in kinds:
        byte_of = byte_level_alphabet()
        present = [byte for char, byte in byte_of.items() if char in vocabulary]
    elif model.get("byte_fallback"):
        byte_of = {}
        present = [byte for byte in range(256) if f"<0x{byte:02X}>" in vocabulary]
    else:
        raise FileProblem(
            path,
            f"is a {model.get('type')} model without byte-level tokens or byte fallback",
            "use a byte-level tokenizer, or one with byte fallback",
        )
    check_all_bytes(path, present)
    for token, token_id in vocabulary.items():
        if token_id in added:
            token_bytes[token_id] = b"" if added[token_id]["special"] else token.encode()
        elif byte_of:
            known = all(char in byte_of for char in token)
            token_bytes[token_id] = bytes(byte_of[char] for char in token) if known else token.encode()
        elif token_id == vocabulary.get(model.get("unk_token") or "") or token_id == model.get("unk_id"):
            continue
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            token_bytes[token_id] = bytes([int(token[3:5], 16)])
        else:
            token_bytes[token_id] = token.replace(SPACE_MARK, " ").encode()
    return token_bytes


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, in sequences as well."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(name, []):
            yield from _steps(step)


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character in byte-level tokens.

    Printable characters of Latin-1 stand for themselves; the remaining bytes have characters from U+0100 on
    (GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}
