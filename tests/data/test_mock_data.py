"""`train --mock-data` trains without a corpus and a tokenizer, on equal files wherever it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.data.mock_data import provide_mock_data
from sas_megatron.data.token_files import load_manifest, open_token_files, verify_token_files
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.fork_server import run_command
from tests.run_configs import small_config

# Without token files and tokenizer.
WITHOUT_CORPUS = """\
model: {num_layers: 2, hidden_size: 48, ffn_hidden_size: 64, vocab_size: 301}
attention: {kind: mha, num_heads: 4, head_dim: 12}
data: {sequence_length: 40}
optimizer: {learning_rate: 1e-2}
training: {num_steps: 6, global_batch_size: 8, micro_batch_size: 4}
evaluation: {num_sequences: 6}
logging: {run_directory: run, interval: 1, trackers: []}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sas_megatron" / "mock_data"


@pytest.mark.parametrize("vocab_size", [260, 70_000])
def test_mock_token_files_are_valid_and_the_same_everywhere(
    cache: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = small_config().data
    mock = provide_mock_data(data, vocab_size=vocab_size)
    manifest = verify_token_files(mock.prefixes[0], vocab_size, full=True)
    tokenizer = open_token_files(mock, vocab_size=vocab_size, verify=True)
    assert tokenizer.vocab_size == vocab_size
    tokens = np.memmap(f"{mock.prefixes[0]}.bin", dtype=manifest.dtype, mode="r")
    assert tokens.max() <= manifest.max_token_id < vocab_size
    assert manifest.text_bytes == len(tokenizer.decode_bytes(tokens.tolist()))
    # The files of another node with another cache are the same.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other = load_manifest(provide_mock_data(data, vocab_size=vocab_size).prefixes[0])
    assert (other.bin_sha256, other.tokenizer_sha256) == (manifest.bin_sha256, manifest.tokenizer_sha256)


def test_damaged_mock_files_are_written_again(cache: Path) -> None:
    data = small_config().data
    prefix = provide_mock_data(data, vocab_size=300).prefixes[0]
    written = Path(f"{prefix}.bin").stat()
    assert provide_mock_data(data, vocab_size=300).prefixes == [prefix]
    assert os.stat(f"{prefix}.bin").st_ino == written.st_ino, "intact files are kept"
    with open(f"{prefix}.bin", "r+b") as file:
        file.write(b"damaged")
    provide_mock_data(data, vocab_size=300)
    verify_token_files(prefix, full=True)
    assert [path.name for path in cache.iterdir()] == [Path(prefix).parent.name]


def test_long_samples_have_more_mock_tokens(cache: Path) -> None:
    data = small_config(data={"sequence_length": 100_000, "split": [0.9, 0.1]}).data
    open_token_files(provide_mock_data(data, vocab_size=300), vocab_size=300)


def test_a_vocabulary_without_bytes_is_refused(cache: Path) -> None:
    with pytest.raises(
        FieldError, match=r"model.vocab_size=45: is too small for mock data.*; use 260"
    ) as caught:
        provide_mock_data(small_config().data, vocab_size=45)
    assert caught.value.fix == ("model.vocab_size=260",)


def test_a_run_without_a_corpus_trains_and_resumes(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "run.yaml").write_text(WITHOUT_CORPUS)
    command = ("train", "run.yaml", "--mock-data")
    done = run_command(*command, "training.stop_after_steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Overrides may follow the option, and the run directory is complete.
    done = run_command(*command, "checkpoint.resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert load_tokenizer(tmp_path / "run" / "tokenizer.model").vocab_size == 301
    # The newest checkpoint under Megatron-LM's name.
    pointer = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert pointer.read_text() == "6"
    assert [path.name for path in pointer.parent.iterdir() if path.is_dir()].count("iter_0000006") == 1
