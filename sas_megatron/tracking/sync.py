"""Send the rows of a run to its trackers, each row once.

    metrics.jsonl -> complete rows after the last step that was sent -> tracker -> trackers/NAME.json

A process may be killed at any moment: the record, or the tracker itself, decides what it has received.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sas_megatron.config.errors import FileProblem
from sas_megatron.tracking.mlflow_tracker import MlflowTracker
from sas_megatron.tracking.rows import RowReader, has_ended
from sas_megatron.tracking.sent_record import (
    SentRecord,
    locked,
    read_sent_record,
    record_path,
    write_sent_record,
)
from sas_megatron.tracking.tracker import NotReached, TrackedRun, Tracker, load_tracked_run
from sas_megatron.tracking.wandb_tracker import build_wandb_tracker


def build_tracker(name: str, run: TrackedRun) -> Tracker:
    """Return a tracker of `REMOTE_TRACKERS` for a run. It does not connect yet."""
    return build_wandb_tracker(run) if name == "wandb" else MlflowTracker(run)


@dataclass(frozen=True)
class SyncResult:
    """What a tracker has received: the number of new rows, and the last step; `problem` if not all rows."""

    tracker: str
    num_rows: int
    last_step: int
    problem: str | None = None


class Sender:
    """Sends the rows of one run to one tracker, over a connection that stays open.

    Args:
        run: The run.
        tracker: The tracker.
    """

    def __init__(self, run: TrackedRun, tracker: str) -> None:
        self._run, self._name = run, tracker
        self._reader = RowReader(run.directory)
        self._save = functools.partial(write_sent_record, run.directory, tracker)
        self._tracker: Tracker | None = None
        self._record: SentRecord | None = None

    def send(self) -> SyncResult:
        """Send the complete rows that have not been sent; connect only if there are any.

        Raises:
            FileProblem: The record is damaged, or belongs to another destination; or a file cannot be read or
                written.
        """
        if self._record is None:
            self._record = read_sent_record(self._run.directory, self._name)
        last_step = 0 if self._record is None else self._record.last_step
        rows = self._reader.read(after=last_step)
        is_pending = self._record is not None and self._record.pending is not None
        if not rows and not is_pending:
            return SyncResult(self._name, 0, last_step)
        try:
            record = self._connect()
            if record.last_step < last_step:  # the server has not received all that was sent
                self._reader.rewind()
                rows = self._reader.read(after=record.last_step)
            rows = [row for row in rows if row.step > record.last_step]
            if rows:
                assert self._tracker is not None
                record = self._tracker.send(rows, record, self._save)
            self._record = record
            return SyncResult(self._name, len(rows), record.last_step)
        except NotReached as error:
            # What was sent before the error is in the record.
            self._tracker, self._record = None, None
            self._reader.rewind()
            recorded = read_sent_record(self._run.directory, self._name)
            return SyncResult(self._name, 0, recorded.last_step if recorded else 0, str(error))

    def _connect(self) -> SentRecord:
        if self._tracker is not None and self._record is not None:
            return self._record
        tracker = build_tracker(self._name, self._run)
        record = self._record or SentRecord(run_id=self._run.run_id, destination=tracker.destination)
        path = record_path(self._run.directory, self._name)
        if record.run_id != self._run.run_id:
            raise FileProblem(
                path, f"is that of another run ({record.run_id})", "remove it, or restore run.json"
            )
        if record.destination != tracker.destination:
            raise FileProblem(
                path,
                f"states that the run is sent to {record.destination}, and this command would send it to "
                f"{tracker.destination}",
                "restore the variables of the tracker, or remove the record to send all steps there",
            )
        record = tracker.recover(record)
        self._save(record)
        self._tracker = tracker
        return record

    def close(self) -> None:
        """Disconnect, and mark a run that has ended as finished."""
        if self._tracker is not None:
            with contextlib.suppress(NotReached):
                self._tracker.close(has_finished=has_ended(self._run.directory))

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sync_run(directory: Path, trackers: Sequence[str]) -> list[SyncResult]:
    """Send the rows of a run that have not been sent to each of `trackers`.

    Raises:
        UserError: The directory holds no run, or a record is damaged.
    """
    run = load_tracked_run(directory)
    results = []
    for name in trackers:
        with locked(directory, name, wait=False) as is_held:
            if not is_held:
                problem = "another process is sending this run"
                recorded = read_sent_record(directory, name)
                results.append(SyncResult(name, 0, recorded.last_step if recorded else 0, problem))
                continue
            with Sender(run, name) as sender:
                results.append(sender.send())
    return results
