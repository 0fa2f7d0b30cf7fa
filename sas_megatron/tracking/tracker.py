"""What all trackers have in common: the run that they show, and the interface through which rows are sent."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import flatten_config, load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.run_record import RECORD, read_run_record
from sas_megatron.tracking.rows import Row
from sas_megatron.tracking.sent_record import SentRecord

# Trackers that receive rows from another process; TensorBoard's files are written by the run itself.
REMOTE_TRACKERS = ("wandb", "mlflow")
Save = Callable[[SentRecord], None]


class NotReached(Exception):
    """A tracker refuses a connection, or does not answer; the rows can be sent later.

    Args:
        error: The error of the tracker's library; its message may have many lines.
    """

    def __init__(self, error: object) -> None:
        super().__init__(" ".join(str(error).split())[:300])


@dataclass(frozen=True)
class TrackedRun:
    """A run directory as a tracker shows it."""

    directory: Path
    run_id: str
    started_at: datetime
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.directory.resolve().name

    def fields(self) -> dict[str, Any]:
        """Return the config by dotted field."""
        return flatten_config(self.config)


def load_tracked_run(directory: Path) -> TrackedRun:
    """Read what trackers show of a run.

    Raises:
        UserError: The directory holds no run, or its config or run.json is damaged.
    """
    record = read_run_record(directory)
    if record is None or not record.sessions:
        raise FileProblem(
            directory / RECORD,
            "is missing, or has no sessions",
            "name the directory of a run that has started",
        )
    try:
        config = load_run_config(directory / "config.yaml")
    except FileProblem:
        raise
    except UserError as error:
        raise FileProblem(
            directory / "config.yaml", f"is not a valid config ({error})", "load it with its version"
        ) from None
    started_at = datetime.fromisoformat(record.sessions[0].started_at)
    return TrackedRun(directory, record.run_id, started_at, config)


class Tracker(ABC):
    """Sends rows of one run; each method may raise `NotReached`.

    Attributes:
        name: Its name in `logging.trackers`.
        destination: The server and project, without passwords.
    """

    name: str
    destination: str

    @abstractmethod
    def recover(self, record: SentRecord) -> SentRecord:
        """Connect, and return the record with what an interrupted process has sent without recording it."""

    @abstractmethod
    def send(self, rows: Sequence[Row], record: SentRecord, save: Save) -> SentRecord:
        """Send rows in ascending order of steps; `save` each new record, and return the last one."""

    @abstractmethod
    def close(self, *, has_finished: bool) -> None:
        """Disconnect; `has_finished` marks the run as finished."""


def check_installed(trackers: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        FieldError: One is not.
    """
    for name in trackers:
        if name in REMOTE_TRACKERS and not _is_installed(name):
            remaining = f"logging.trackers=[{', '.join(other for other in trackers if other != name)}]"
            raise FieldError(
                "logging.trackers",
                list(trackers),
                f"names {name}, which is not installed",
                f"pip install 'sas-megatron[{name}]', or set {remaining}",
                (remaining,),
            )


def _is_installed(package: str) -> bool:
    """Return whether a package is installed; a folder of that name, as W&B creates, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
