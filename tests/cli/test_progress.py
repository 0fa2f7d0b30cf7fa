"""Tests of the progress display of `data prepare`."""

from __future__ import annotations

import pytest

from sas_megatron.cli import data as data_command
from sas_megatron.cli.data import show_progress
from sas_megatron.data.prepare import PreparationProgress

STATE = PreparationProgress(
    num_documents=1234, num_tokens=5678, text_bytes=9999, source_bytes_read=30, source_bytes=120
)


def test_lines_are_printed_only_after_some_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with show_progress() as report:
        report(STATE)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(data_command, "SECONDS_BETWEEN_LINES", 0.0)
        report(STATE)
    assert capsys.readouterr().err.startswith("25% 1,234 documents, 5,678 tokens, ")


def test_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with show_progress() as report:
        report(STATE)
    assert "1,234 documents" in capsys.readouterr().err
