"""A corpus and a tokenizer that are smaller than in the tests of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.data.corpus import builtin_corpus
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of 300 kB of text."""
    return builtin_corpus(tmp_path_factory.mktemp("corpus"), max_bytes=300_001)


@pytest.fixture(scope="module")
def tokenizer_path(corpus: Path) -> Path:
    """A tokenizer of 511 tokens, trained on the corpus."""
    path = corpus.with_name("small.model")
    train_tokenizer(stream_documents([corpus]), vocab_size=511, model_path=path)
    return path
