"""The data benchmark reports the measurements that its field names state."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.benchmarks.data import measure_preparation
from sas_megatron.config.errors import FileProblem
from sas_megatron.data.prepare import prepare_token_files


def test_speed_and_memory_are_measured(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    measured = measure_preparation(corpus, tokenizer_path, workers=2, repeats=1)
    preparation = prepare_token_files(
        [corpus], tokenizer_path=tokenizer_path, prefix=tmp_path / "tokens", num_workers=2
    )
    assert measured["tokens"] == preparation.manifest.num_tokens
    assert measured["ratio"] == measured["prepare_tokens_per_second"] / measured["bare_tokens_per_second"]
    assert measured["bare_tokens_per_second"] > 10_000
    # Python with pyarrow and two workers takes more than 60 MB and much less than a gigabyte.
    assert 60e6 < measured["peak_memory_bytes"] < 900e6
    assert measured["peak_memory_bytes_of_triple"] < 900e6


def test_a_missing_script_of_megatron_lm_is_an_error_before_any_measurement(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileProblem, match=r"tools/preprocess_data\.py: does not exist; give a checkout"):
        measure_preparation(
            tmp_path / "not read.parquet", tokenizer_path, workers=1, megatron_lm=tmp_path / "elsewhere"
        )
