"""Token files and tokenizer of a run, checked before anything heavy starts; no torch."""

from __future__ import annotations

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.data.token_files import load_manifest, verify_token_files
from sas_megatron.data.tokenizer import Tokenizer

# Up to this many bytes, a second or so, token files are read whole before a run; beyond it their
# sizes, headers and records are compared (`sas-megatron data inspect --verify` reads them whole).
VERIFIED_WHOLE_BYTES = 2**30


def open_token_files(data: DataConfig, *, vocab_size: int, verify: bool = False) -> Tokenizer:
    """Checks the token files and their tokenizer against each other and the model, and opens the latter.

    Args:
        data: Names the files.
        vocab_size: Rows of the model's embedding that stand for tokens.
        verify: Read files of up to `VERIFIED_WHOLE_BYTES` whole, for damage and tokens beyond the vocabulary.

    Raises:
        FieldError: the tokenizer is another than the one that wrote a token file, or larger than the model;
            or a file is shorter than one sample.
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
        manifest = load_manifest(prefix)
        # Megatron-core would look for a sample's tokens in it for ever.
        if manifest.num_tokens <= data.sequence_length:
            raise FieldError(
                "data.sequence_length",
                data.sequence_length,
                f"must be less than the {manifest.num_tokens} tokens of {prefix}",
                "prepare more documents, or use a shorter one",
            )
        verify_token_files(prefix, vocab_size, full=verify and manifest.bin_bytes <= VERIFIED_WHOLE_BYTES)
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise FieldError(
                "data.tokenizer",
                data.tokenizer,
                f"is not the tokenizer that wrote {prefix}",
                "give that one, or prepare the data again",
            )
    return tokenizer
