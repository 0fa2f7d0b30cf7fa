"""State of each run of a study, derived from its files alone.

A run is in progress while its file lock is held. The kernel releases the lock with the last process that
holds it, even after a crash, so that no cleanup is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import find_differences
from sas_megatron.io.file_locks import acquire_file_lock
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study.plan import PlannedRun
from sas_megatron.training.data_identity import remove_equal_data
from sas_megatron.training.resuming import find_saved_config

State = Literal["done", "running", "queued", "stuck", "failed", "diverged", "interrupted", "ready", "waiting"]
# Fields that may differ between a run and its plan, since they do not affect the result.
IGNORED_FIELDS = (
    "checkpoint.",
    "data.index_cache",
    "evaluation.probe_sequences",
    "logging.",
    "training.stop_after_",
    "training.collective_timeout_minutes",
)
# Lines of a log that state the cause of a failure, the most specific pattern first.
_CAUSES = (
    re.compile(r"^sas-megatron: (error|training stopped)"),
    # The exception of a rank, before that of the launcher, which is printed later.
    re.compile(r"^\[rank\d+\]: [\w.]*(Error|Fault|Exception)\b"),
    re.compile(r"^[\w.]*(Error|Fault|Exception)\b"),
    re.compile(""),
)


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, the reason for it, and the last logged step."""

    run: PlannedRun
    state: State
    step: int
    reason: str | None = None
    # Mean seconds per step in its metrics.
    step_seconds: float | None = None

    @property
    def remaining_steps(self) -> int:
        """Steps that remain to be trained, without the steps of the trunk."""
        if self.state in ("done", "diverged"):
            return 0
        return self.run.config.training.num_steps - max(self.step, self.run.trunk_steps)


def log_path(run: PlannedRun) -> Path:
    """Return the path of the output of a run's processes."""
    return run.directory.parents[1] / "logs" / f"{run.name}.log"


def failure_path(run: PlannedRun) -> Path:
    """Return the path of the record of a failure; it exists until the run is started again."""
    return run.directory.parents[1] / "logs" / f"{run.name}.failed.json"


def lock_path(run: PlannedRun) -> Path:
    """Return the path of the lock file that the processes of a run hold."""
    return run.directory.parents[1] / "logs" / f"{run.name}.lock"


@contextlib.contextmanager
def acquire_lock(run: PlannedRun) -> Iterator[int | None]:
    """Yield the descriptor of the run's lock, for its processes to inherit; None if the lock is held."""
    path = lock_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor if acquire_file_lock(descriptor) else None
    finally:
        os.close(descriptor)


def is_locked(run: PlannedRun) -> bool:
    """Return whether a process holds the lock; the check does not prevent others from acquiring it."""
    try:
        descriptor = os.open(lock_path(run), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not acquire_file_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def final_loss(run: PlannedRun) -> float | None:
    """Return the validation loss of a finished run; None if it has none."""
    loss = (_read(run.directory / "summary.json") or {}).get("final_validation_loss")
    return float(loss) if isinstance(loss, int | float) else None


def has_diverged(run: PlannedRun) -> bool:
    """Return whether the run stopped after repeated non-finite steps, according to its last record."""
    record = _last_record(run, kind="health")
    return record is not None and record.get("response") == "stop" and not has_finished(run.directory)


def is_settled(run: PlannedRun) -> bool:
    """Return whether the run is complete: it has finished, or is a run of a sweep that diverged."""
    return has_finished(run.directory) or (run.role == "sweep" and has_diverged(run))


def check_config(run: PlannedRun) -> None:
    """Check that the config of the run in the run directory, if there is one, is the planned one.

    Raises:
        FieldError: A field that affects the result differs.
        FileProblem: The config of the run cannot be read.
    """
    saved = find_saved_config(run.directory)
    if saved is None:
        return
    config, path = saved
    differences = find_differences([run.config, config], ignored=IGNORED_FIELDS)
    for field, (planned, found) in remove_equal_data(differences, run.config, run.directory).items():
        raise FieldError(
            field,
            found,
            f"is the value in {path}, but the study now plans {planned}",
            "restore the study file, remove that run, or choose another directory for the new study",
        )


def read_status(run: PlannedRun, *, job_log: Path | None = None, is_queued: bool = False) -> RunStatus:
    """Return the state of a run.

    Args:
        run: The run.
        job_log: The output of the job that was submitted for it, if any.
        is_queued: Whether that job is pending or running.
    """
    step, step_seconds = _last_step(run)
    if has_finished(run.directory):
        return RunStatus(run, "done", run.config.training.num_steps, step_seconds=step_seconds)
    if is_locked(run) or (is_queued and job_log is not None and job_log.exists()):
        log = log_path(run) if is_locked(run) or job_log is None else job_log
        silence = time.time() - _last_written(run, log)
        if silence > 60 * run.config.training.collective_timeout_minutes:
            reason = f"no output for {silence / 60:.0f} minutes; see {log}"
            return RunStatus(run, "stuck", step, reason, step_seconds)
        return RunStatus(run, "running", step, None, step_seconds)
    if is_queued:
        return RunStatus(run, "queued", step, None, step_seconds)
    if is_settled(run):
        return RunStatus(run, "diverged", step, "its learning rate is too high", step_seconds)
    failure = _read(failure_path(run))
    if failure is not None:
        return RunStatus(run, "failed", step, failure.get("reason"), step_seconds)
    if job_log is not None and job_log.exists() and not (run.directory / "stopped.json").exists():
        return RunStatus(run, "failed", step, f"{last_error(job_log)} ({job_log})", step_seconds)
    if step:
        return RunStatus(run, "interrupted", step, "resumes when it is started again", step_seconds)
    dependency = find_dependency(run)
    return RunStatus(run, "ready" if dependency is None else "waiting", 0, dependency)


def find_dependency(run: PlannedRun) -> str | None:
    """Describe the dependency that is not yet met; None if the run can start."""
    if not run.is_ready:
        return "the sweep that determines its learning rate"
    checkpoint = run.config.checkpoint.branch_from
    has_started = (run.directory / "metrics.jsonl").exists()
    if checkpoint is not None and not has_started and not Path(checkpoint).exists():
        return f"step {run.trunk_steps} of {run.trunk}"
    return None


def last_error(log: Path, *, offset: int = 0) -> str:
    """Return the line of a log that states why the processes ended, or else its last line.

    Args:
        log: The log.
        offset: Bytes at its beginning that belong to earlier attempts.
    """
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read().decode(errors="replace")
    except OSError:
        return f"no log ({log})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern in _CAUSES:
        for line in reversed(lines):
            if pattern.search(line):
                return line
    return "no output"


def _last_step(run: PlannedRun) -> tuple[int, float | None]:
    """Return the step of the last training record and the mean seconds per step; (0, None) without any."""
    record = _last_record(run, kind="train")
    step, seconds = (record or {}).get("step"), (record or {}).get("elapsed_seconds")
    if not (isinstance(step, int) and isinstance(seconds, int | float) and step > 0):
        return 0, None
    return step, seconds / step


def _last_record(run: PlannedRun, *, kind: str) -> dict[str, Any] | None:
    """Return the last complete record if it has that kind; for `train`, the last record of that kind."""
    try:
        lines = (run.directory / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        record = _parse_object(line)
        if record is None:
            continue
        if record.get("kind") == kind:
            return record
        if kind != "train":
            return None
    return None


def _last_written(run: PlannedRun, log: Path) -> float:
    paths = [log, run.directory / "metrics.jsonl", lock_path(run)]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if it does not exist, or a crash or an edit has damaged it."""
    try:
        return _parse_object(path.read_bytes())
    except OSError:
        return None


def _parse_object(content: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        return value if isinstance(value, dict) else None
    return None
