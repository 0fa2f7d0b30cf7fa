"""Rows as the history of a W&B run: sent to a server, or written for `wandb sync` (WANDB_MODE=offline).

The id of the W&B run is that of the run in run.json, so that all sessions are one run. WANDB_ENTITY,
WANDB_API_KEY and WANDB_BASE_URL are read by W&B itself.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from sas_megatron.io.files import make_folder, sync
from sas_megatron.tracking.rows import Row
from sas_megatron.tracking.sent_record import FOLDER, Pending, SentRecord
from sas_megatron.tracking.tracker import NotReached, Save, TrackedRun, Tracker

_OFFLINE_MODES = ("offline", "dryrun")
ROWS_PER_RECORD = 100
# Offline parts of the run, each for one session, which `wandb sync RUN/wandb/offline-run-*` uploads.
PARTS = "wandb"
_UNPUBLISHED = "wandb.unpublished."


def build_wandb_tracker(run: TrackedRun) -> Tracker:
    """Return the tracker for WANDB_MODE."""
    return OfflineWandbTracker(run) if is_offline() else OnlineWandbTracker(run)


def is_offline() -> bool:
    """Return whether WANDB_MODE selects files for `wandb sync` instead of a server."""
    return os.environ.get("WANDB_MODE", "").lower() in _OFFLINE_MODES


def _init(run: TrackedRun, *, folder: Path, mode: Literal["online", "offline"]) -> Any:
    """Start a W&B run; it records neither the machine nor the program, which run.json describes."""
    import wandb

    settings = run.config.logging
    try:
        return wandb.init(
            project=settings.tracker_project,
            id=run.run_id,
            name=run.name,
            group=settings.tracker_group,
            tags=settings.tracker_tags,
            config=run.fields(),
            dir=str(folder),
            mode=mode,
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                init_timeout=60,
            ),
        )
    except (wandb.Error, OSError) as error:
        raise NotReached(error) from error


class OnlineWandbTracker(Tracker):
    """Sends rows to a W&B server, which knows the last step that it has received."""

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rpartition("@")[2]
        entity = os.environ.get("WANDB_ENTITY", "")
        self.destination = f"{server} {entity}/{run.config.logging.tracker_project}"
        self._wandb_run: Any = None

    @override
    def recover(self, record: SentRecord) -> SentRecord:
        folder = self._run.directory / FOLDER
        make_folder(folder)
        self._wandb_run = _init(self._run, folder=folder, mode="online")
        # W&B counts steps from 0 and continues after the last one that the server has. It sends in the
        # background, so that a machine that fails may not have sent all that is recorded.
        return record.model_copy(update={"last_step": max(0, int(self._wandb_run.step) - 1)})

    @override
    def send(self, rows: Sequence[Row], record: SentRecord, save: Save) -> SentRecord:
        for index, row in enumerate(rows, start=1):
            self._wandb_run.log(row.scalars, step=row.step, commit=True)
            if index % ROWS_PER_RECORD == 0 or index == len(rows):
                record = record.model_copy(update={"last_step": row.step})
                save(record)
        return record

    @override
    def close(self, *, has_finished: bool) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=0)


class OfflineWandbTracker(Tracker):
    """Writes rows to a part of the run, which is published under its final name when it is complete."""

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self.destination = f"offline {run.config.logging.tracker_project}"
        self._folder = run.directory / PARTS

    @override
    def recover(self, record: SentRecord) -> SentRecord:
        for unpublished in (self._run.directory / FOLDER).glob(f"{_UNPUBLISHED}*"):
            shutil.rmtree(unpublished, ignore_errors=True)
        pending = record.pending
        is_published = pending is not None and (self._folder / pending.folder).is_dir()
        last_step = pending.last_step if pending is not None and is_published else record.last_step
        return record.model_copy(update={"last_step": last_step, "pending": None})

    @override
    def send(self, rows: Sequence[Row], record: SentRecord, save: Save) -> SentRecord:
        unpublished = self._run.directory / FOLDER / f"{_UNPUBLISHED}{uuid.uuid4().hex}"
        make_folder(unpublished)
        try:
            part = self._write_part(rows, unpublished)
            last_step = rows[-1].step
            name = f"{part.name}-to-step-{last_step}"
            # A process that is killed after this has sent the rows if the folder has its final name.
            save(record.model_copy(update={"pending": Pending(last_step=last_step, folder=name)}))
            make_folder(self._folder)
            part.rename(self._folder / name)
            sync(self._folder)
        finally:
            shutil.rmtree(unpublished, ignore_errors=True)
        record = record.model_copy(update={"last_step": last_step, "pending": None})
        save(record)
        return record

    def _write_part(self, rows: Sequence[Row], folder: Path) -> Path:
        wandb_run = _init(self._run, folder=folder, mode="offline")
        for row in rows:
            wandb_run.log(row.scalars, step=row.step, commit=True)
        wandb_run.finish(exit_code=0)
        (part,) = (folder / "wandb").glob("offline-run-*")
        for path in (*(path for path in part.rglob("*") if path.is_file()), part):
            sync(path)
        return part

    @override
    def close(self, *, has_finished: bool) -> None:
        """Do nothing: each part is complete."""
