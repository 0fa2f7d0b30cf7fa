"""The corpus and tokenizer of the data tests."""

from tests.data.conftest import corpus, tokenizer_path

__all__ = ["corpus", "tokenizer_path"]
