"""Fixtures: a small corpus, its tokenizer and its token files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.data.corpus import builtin_corpus
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.data.tokenizer_training import train_tokenizer
from tests.data.preparing import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin_corpus(tmp_path_factory.mktemp("corpus"), max_bytes=3_000_001)


@pytest.fixture(scope="session")
def tokenizer_path(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(stream_documents([corpus]), vocab_size=1023, model_path=path, sample_bytes=500_000)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def prepared(corpus: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of token files of the corpus, prepared by one worker without interruption."""
    prefix = tmp_path_factory.mktemp("prepared") / "v1.0" / "tokens"
    prepare(corpus, tokenizer_path, prefix)
    return prefix
