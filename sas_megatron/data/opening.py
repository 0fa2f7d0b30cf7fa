"""Token files and tokenizer of a run, checked before anything heavy starts; no torch."""

from __future__ import annotations

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.data.token_files import load_manifest, verify_token_files
from sas_megatron.data.tokenizer import Tokenizer


def open_token_files(data: DataConfig, *, vocab_size: int) -> Tokenizer:
    """Checks the token files and their tokenizer against each other and the model, and opens the latter.

    Raises:
        FieldError: the tokenizer is another than the one that wrote a token file, or larger than the model.
        FileProblem: a file is missing, damaged or holds a token the model has no row for.
    """
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise FieldError(
            "model.vocab_size",
            vocab_size,
            f"is less than the {tokenizer.vocab_size} pieces of {data.tokenizer}",
            f"use {tokenizer.vocab_size}",
        )
    for prefix in data.prefixes:
        verify_token_files(prefix, vocab_size)
        if load_manifest(prefix).tokenizer_sha256 != tokenizer.sha256:
            raise FieldError(
                "data.tokenizer",
                data.tokenizer,
                f"is not the tokenizer that wrote {prefix}",
                "give that one, or prepare the data again",
            )
    return tokenizer
