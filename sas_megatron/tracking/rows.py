"""metrics.jsonl as rows for trackers: the numbers of all records of a step, under Megatron-LM's names.

A row is complete when a record of a later step follows, or the run has ended. A tracker gets each row once,
so that an incomplete one is not sent: the evaluation after its step may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
# Reasons of an end after which no record of the last step follows (`fault_tolerance.stop_request`).
FINAL_REASONS = ("finished", "stop_after_steps")
# Kind and name of a number -> its name in Megatron-LM (`training_log` and `evaluate_and_print_results` in
# megatron/training/training.py). Other numbers have the name `kind/name`.
TAGS = {
    ("train", "train_loss"): "lm loss",
    ("train", "learning_rate"): "learning-rate",
    ("train", "gradient_norm"): "grad-norm",
    ("train", "step_seconds"): "iteration-time",
    ("validation", "validation_loss"): "lm loss validation",
    ("validation", "validation_perplexity"): "lm loss validation ppl",
    ("validation", "validation_bits_per_byte"): "lm loss validation bits per byte",
}
_SET_TAGS = {"loss": "", "perplexity": " ppl", "bits_per_byte": " bits per byte"}


@dataclass
class Row:
    """The numbers of a step by tag, and the seconds of training until then (None if not recorded)."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    elapsed_seconds: float | None = None


def list_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by tag; None, lists and counts are left out."""
    kind = record["kind"]
    scalars = {
        TAGS.get((kind, name), f"{kind}/{name}"): value
        for name, value in record.items()
        if isinstance(value, float)
    }
    for name, found in (record.get("validation_sets") or {}).items():
        for measure, ending in _SET_TAGS.items():
            if isinstance(found.get(measure), float):
                scalars[f"lm loss validation {name}{ending}"] = found[measure]
    return scalars


class RowReader:
    """Reads the complete rows of a run that may still be training.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        # The file whose first bytes have been read, and the number of these bytes.
        self._file: int | None = None
        self._offset = 0

    def read(self, *, after: int) -> list[Row]:
        """Return the complete rows with a step above `after` that no earlier call has passed.

        A file that was replaced, because the run was resumed, is read from its beginning. Lines that are no
        records are left out, as the run does when it is resumed.

        Raises:
            OSError: The file exists and cannot be read.
        """
        # First, since a run writes it after its last record.
        is_final = has_ended(self._run)
        try:
            file = (self._run / METRICS).open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._file:
                self._file, self._offset = inode, 0
            file.seek(self._offset)
            content = file.read()
        rows: list[Row] = []
        start, begin = self._offset, self._offset
        for line in content.splitlines(keepends=True):
            record = _parse(line) if line.endswith(b"\n") else None
            if record is not None:
                if not rows or rows[-1].step != record["step"]:
                    rows.append(Row(record["step"]))
                    begin = start
                rows[-1].scalars |= list_scalars(record)
                seconds = record.get("elapsed_seconds")
                rows[-1].elapsed_seconds = seconds if isinstance(seconds, float) else rows[-1].elapsed_seconds
            start += len(line)
        if rows and not is_final:
            rows.pop()
            self._offset = begin
        else:
            self._offset = start if content.endswith(b"\n") else begin
        return [row for row in rows if row.step > after]

    def rewind(self) -> None:
        """Read from the beginning again, after rows could not be sent."""
        self._file = None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = (
        isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str)
    )
    return record if is_record else None


def has_ended(run: Path) -> bool:
    """Return whether a run has ended with all records of its last step, also its evaluation."""
    try:
        summary = json.loads((run / SUMMARY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and summary.get("exit_reason") in FINAL_REASONS
