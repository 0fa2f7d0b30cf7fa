"""Train a byte-level BPE with the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sas_megatron.config.errors import FieldError

END_OF_DOCUMENT = "<|endoftext|>"


def train_byte_level(passages: Sequence[str], *, vocab_size: int, special_tokens: Sequence[str]) -> bytes:
    """Return the tokenizer.json of a BPE over bytes, which splits words as GPT-2 does.

    Args:
        passages: The texts.
        vocab_size: Number of tokens: the special tokens, the 256 bytes and the merges.
        special_tokens: Names of special tokens in addition to `<|endoftext|>`, which has id 0.

    Raises:
        FieldError: The vocabulary is too small or too large for the text, or a special token is given twice.
    """
    special = [END_OF_DOCUMENT, *special_tokens]
    if len(set(special)) < len(special) or "" in special:
        raise FieldError(
            "special_token", ", ".join(special), "must be different names", "name each special token once"
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise FieldError(
            "vocab_size",
            vocab_size,
            f"is too small for the 256 bytes and {len(special)} special tokens",
            f"use at least {len(special) + len(alphabet)}",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(passages, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise FieldError(
            "vocab_size", vocab_size, "is too large for the text", f"use at most {found}, or more text"
        )
    content: str = tokenizer.to_str(pretty=True)
    return (content + "\n").encode()
