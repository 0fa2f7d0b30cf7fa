"""The tables of `sas-megatron evaluate` fit into 80 columns without losing text."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.cli.evaluation_tables import show_held_out, show_tasks
from sas_megatron.cli.generate import _show

COLUMNS = 80


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rich print for a terminal with 80 columns."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def assert_fits(text: str) -> None:
    lines = text.splitlines()
    assert lines
    assert max(map(len, lines)) <= COLUMNS
    assert "…" not in text


def held_out(loss: float, num_tokens: int, num_bytes: int, perplexity: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": loss / num_bytes,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
    }


def test_held_out_tables_fit_with_eight_lengths_and_long_names(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [2**exponent for exponent in range(10, 18)]
    long_name = "documents_of_a_domain_with_a_long_name_2026-11.parquet"
    loss = held_out(11.7654, 123_456_789_012, 345_678_901_234, 1.3e5)
    by_position = [
        {**loss, "tokens_read": [2**bucket // 2 + 1, 2**bucket], "loss": 12.0 + bucket}
        for bucket in range(18)
    ]
    rows = [
        {
            "sequence_length": length,
            "stride": length // 2,
            "domains": {long_name: loss, "code": held_out(30.0, 9, 11, 1.07e13)},
            "all": {**loss, "by_position": by_position},
        }
        for length in lengths
    ]
    show_held_out({"trained_length": 131_072, "by_length": rows})
    printed = capsys.readouterr().out
    assert_fits(printed)
    for text in (
        "123,456,789,012",
        "documents_o",
        "130000.00",
        "1.07e+13",
        "65,537–131,072",
        "29.0000",
        "131,072",
    ):
        assert text in printed


def test_the_table_of_tasks_fits_with_long_names(capsys: pytest.CaptureFixture[str]) -> None:
    task = "mmlu_continuation_high_school_government_and_politics_generative"
    metrics = {
        "exact_match,flexible-extract": 0.123456,
        "exact_match_stderr,flexible-extract": 0.0123,
        "acc,none": 1.0,
        "acc_stderr,none": "N/A",
        "alias": task,
    }
    show_tasks({"lm_eval": "0.4.9", "results": {task: metrics}, "groups": {}, "num_fewshot": {task: 25}})
    printed = capsys.readouterr().out
    assert_fits(printed)
    for text in ("0.1235", "0.0123", "1.0000", "25"):
        assert text in printed


def test_the_summary_of_generation_fits(capsys: pytest.CaptureFixture[str]) -> None:
    completion = {"prompt": "import", "text": " os", "num_tokens": 1_048_576, "finish": "end of document"}
    _show(
        {
            "completions": [completion],
            "kv_cache": {"kind": "simulated", "bytes_per_token_and_rank": 1_572_864},
            "seconds": 12345.6,
            "tokens_per_second": 123456.7,
            "step": 1_234_567,
            "empty_prompts": 0,
        }
    )
    printed = capsys.readouterr()
    assert printed.out == "import os\n"
    assert_fits(printed.err)
