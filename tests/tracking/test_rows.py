"""Rows of metrics.jsonl: Megatron-LM's names, and each row only when it is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.tracking.rows import RowReader, list_scalars

TRAIN = {"kind": "train", "step": 3, "train_loss": 2.5, "gradient_norm": 0.5, "learning_rate": 0.1}


def append(run: Path, *records: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def train(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "train_loss": 1.0, "elapsed_seconds": step / 4}


def steps(reader: RowReader, after: int = 0) -> list[int]:
    return [row.step for row in reader.read(after=after)]


def test_numbers_have_the_names_of_megatron() -> None:
    """Those of `training_log` and `evaluate_and_print_results` in megatron/training/training.py."""
    assert list_scalars({**TRAIN, "step_seconds": 0.25, "consumed_samples": 8, "tokens_per_second": 9.0}) == {
        "lm loss": 2.5,
        "grad-norm": 0.5,
        "learning-rate": 0.1,
        "iteration-time": 0.25,
        "train/tokens_per_second": 9.0,
    }
    validation = {"kind": "validation", "step": 3, "validation_loss": 2.0, "validation_perplexity": None}
    sets = {"code": {"loss": 1.0, "perplexity": 3.0, "bits_per_byte": None, "num_tokens": 7}}
    assert list_scalars({**validation, "validation_sets": sets}) == {
        "lm loss validation": 2.0,
        "lm loss validation code": 1.0,
        "lm loss validation code ppl": 3.0,
    }


def test_a_row_is_read_once_it_is_complete(tmp_path: Path) -> None:
    reader = RowReader(tmp_path)
    assert steps(reader) == []
    append(tmp_path, train(1), train(2))
    assert steps(reader) == [1]
    append(tmp_path, {"kind": "validation", "step": 2, "validation_loss": 3.0}, train(3))
    [row] = reader.read(after=1)
    assert (row.step, row.scalars["lm loss"], row.scalars["lm loss validation"]) == (2, 1.0, 3.0)
    assert row.elapsed_seconds == 0.5
    assert steps(reader) == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "train_')  # a line that is being written
    assert steps(reader) == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('loss": 1.5}\n')
    assert steps(reader) == [3]
    (tmp_path / "summary.json").write_text('{"exit_reason": "finished"}')
    assert steps(reader) == [4]
    assert steps(reader) == []


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("finished", [1, 2]), ("stop_after_steps", [1, 2]), ("signal SIGTERM", [1]), ("time limit", [1])],
)
def test_the_last_row_of_a_run_that_is_to_be_resumed_waits(
    tmp_path: Path, reason: str, expected: list[int]
) -> None:
    """An evaluation that is due at the stop is left to the resumed run."""
    append(tmp_path, train(1), train(2))
    (tmp_path / "summary.json").write_text(json.dumps({"exit_reason": reason}))
    assert steps(RowReader(tmp_path)) == expected


def test_a_replaced_file_is_read_again_after_the_last_row_that_was_sent(tmp_path: Path) -> None:
    reader = RowReader(tmp_path)
    append(tmp_path, *map(train, range(1, 6)))
    assert steps(reader) == [1, 2, 3, 4]
    (tmp_path / "metrics.jsonl").rename(tmp_path / "old")
    append(tmp_path, *map(train, range(1, 8)))
    assert steps(reader, after=4) == [5, 6]
    reader.rewind()
    assert steps(reader, after=2) == [3, 4, 5, 6]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    append(tmp_path, train(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"step": "x", "kind": "train"}\n' + b"[" * 5000 + b"\n")
    append(tmp_path, train(2), train(3))
    assert steps(RowReader(tmp_path)) == [1, 2]
