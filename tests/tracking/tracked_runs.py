"""Run directories with records, and what trackers have received of them."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

from sas_megatron.training.run_files import RunFiles
from tests.run_configs import small_config

# Every tenth step has an evaluation.
EVALUATED = 10


def write_run(
    directory: Path, *, first: int = 1, last: int, exit_reason: str | None = None, **logging: Any
) -> str:
    """Write the records of a session from step `first` to `last`; return the id of the run.

    Args:
        directory: The run directory; the session resumes an earlier one after step `first` - 1.
        first: The first step.
        last: The last step.
        exit_reason: That of summary.json; None leaves it out, as in a run that was killed.
        logging: Further fields of the section.
    """
    config = small_config(logging={"run_directory": str(directory), "trackers": [], **logging})
    files = RunFiles(config)
    files.open(config, {"corpus": {}}, resumed_step=first - 1)
    for step in range(first, last + 1):
        files.write_record(
            {"kind": "train", "step": step, "train_loss": 1.0 / step, "elapsed_seconds": step / 2}
        )
        if step % EVALUATED == 0:
            files.write_record(
                {
                    "kind": "validation",
                    "step": step,
                    "validation_loss": 2.0 / step,
                    "elapsed_seconds": step / 2,
                }
            )
    files.close()
    if exit_reason is not None:
        (directory / "summary.json").write_text(json.dumps({"exit_reason": exit_reason, "steps": last}))
    return str(json.loads((directory / "run.json").read_text())["run_id"])


def expected_steps(last: int) -> dict[str, list[int]]:
    """Return the steps of each curve, in order, of a run up to step `last`."""
    return {
        "lm loss": list(range(1, last + 1)),
        "lm loss validation": list(range(EVALUATED, last + 1, EVALUATED)),
    }


def read_offline_parts(run: Path) -> list[Any]:
    """Return the records of all published parts of a W&B run, in the order of the parts' last steps."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for part in sorted((run / "wandb").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])):
        (file,) = part.glob("run-*.wandb")
        for content in _read_log(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            records.append(record)
    return records


def steps_in_parts(run: Path) -> dict[str, list[int]]:
    """Return the steps of each curve in the published parts of a W&B run, as often as they occur."""
    steps: dict[str, list[int]] = {}
    for record in read_offline_parts(run):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for tag in ("lm loss", "lm loss validation"):
                if tag in items:
                    steps.setdefault(tag, []).append(int(json.loads(items["_step"])))
    return steps


def steps_in_database(path: Path) -> dict[str, list[int]]:
    """Return the steps of each curve in MLflow's database, as often as they occur."""
    with sqlite3.connect(path) as database:
        rows = database.execute(
            "select key, step from metrics where key like 'lm loss%' order by step"
        ).fetchall()
    steps: dict[str, list[int]] = {}
    for tag, step in rows:
        steps.setdefault(tag, []).append(step)
    return steps


def _read_log(content: bytes) -> list[bytes]:
    """Return the records of W&B's file: LevelDB's log format, blocks of 32 KiB with a header of 7 bytes."""
    records, part, position = [], b"", 7
    while position + 7 <= len(content):
        if (remaining := 32768 - position % 32768) < 7:
            position += remaining
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:
            break
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            records.append(part)
            part = b""
    return records
