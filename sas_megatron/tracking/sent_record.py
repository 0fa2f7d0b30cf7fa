"""The record of what a tracker has received of a run: `trackers/NAME.json` in the run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.io.file_locks import acquire_file_lock
from sas_megatron.io.file_records import describe_read_error, parse_json, read_regular_file
from sas_megatron.io.files import make_folder, write_file

FOLDER = "trackers"
SCHEMA = 1


class Pending(BaseModel):
    """Rows that are being published: they count as sent if, and only if, `folder` exists."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    last_step: int
    folder: str


class SentRecord(BaseModel):
    """What a tracker has received.

    Attributes:
        run_id: The run's id in run.json.
        destination: The server and project; without passwords.
        last_step: The last step that was sent; 0 before the first.
        remote_id: The tracker's own id of the run, if it differs.
        pending: See `Pending`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA, ge=SCHEMA, le=SCHEMA)
    run_id: str
    destination: str
    last_step: int = Field(default=0, ge=0)
    remote_id: str | None = None
    pending: Pending | None = None


def record_path(run: Path, tracker: str) -> Path:
    """Return the path of a tracker's record."""
    return run / FOLDER / f"{tracker}.json"


def read_sent_record(run: Path, tracker: str) -> SentRecord | None:
    """Return the record of a tracker; None if nothing has been sent.

    Raises:
        FileProblem: It is damaged or cannot be read.
    """
    path = record_path(run, tracker)
    try:
        return SentRecord.model_validate(parse_json(read_regular_file(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FileProblem(
            path,
            f"is damaged ({describe_read_error(error)}), so that the last step that was sent is unknown",
            "restore it from a copy, or remove it to send all steps again",
        ) from None


def write_sent_record(run: Path, tracker: str, record: SentRecord) -> None:
    """Write the record of a tracker atomically.

    Raises:
        FileProblem: It cannot be written.
    """
    path = record_path(run, tracker)
    with translate_os_errors(path, problem="cannot be written", remedy="free disk space, or fix its folder"):
        write_file(path, record.model_dump_json(indent=2) + "\n")


@contextlib.contextmanager
def locked(run: Path, tracker: str, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a tracker's record, so that one process sends at a time; yield whether it is held.

    Raises:
        FileProblem: The folder cannot be written.
    """
    path = record_path(run, tracker).with_suffix(".lock")
    with translate_os_errors(path, problem="cannot be written", remedy="fix the permissions of its folder"):
        make_folder(path.parent)
        file = path.open("a", encoding="utf-8")
    with file:
        yield acquire_file_lock(file.fileno(), wait=wait)
