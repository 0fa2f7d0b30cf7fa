"""Where each run of a study stands, told from its files alone.

A run is worked on while somebody holds its lock: the file lock ends with the last process that has it,
however that ends, so nobody has to clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import find_differences, load_run_config
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study.plan import PlannedRun

State = Literal["done", "running", "queued", "stuck", "failed", "diverged", "interrupted", "ready", "waiting"]
# What may differ between a run and its plan: nothing that decides its result.
INERT = ("checkpoint.", "logging.", "training.stop_after_", "training.collective_timeout_minutes")
_TELLS_WHY = (
    re.compile(r"^sas-megatron: (error|training stopped)"),
    # A rank's before the launcher's, which comes after it.
    re.compile(r"^\[rank\d+\]: [\w.]*(Error|Fault|Exception)\b"),
    re.compile(r"^[\w.]*(Error|Fault|Exception)\b"),
    re.compile(""),
)


@dataclass(frozen=True)
class RunStatus:
    """One run: where it stands, why, and how far it has come."""

    run: PlannedRun
    state: State
    step: int
    reason: str | None = None
    # Seconds of a step, by its own metrics.
    step_seconds: float | None = None

    @property
    def remaining_steps(self) -> int:
        """Steps still to be taken, none of the trunk's."""
        trunk_steps = self.run.config.training.num_steps - self.run.own_steps
        return (
            0
            if self.state in ("done", "diverged")
            else self.run.config.training.num_steps - max(self.step, trunk_steps)
        )


def log_of(run: PlannedRun) -> Path:
    """What a run's processes printed."""
    return run.directory.parents[1] / "logs" / f"{run.name}.log"


def failure_of(run: PlannedRun) -> Path:
    """Why the last try of a run failed; there only while it is to be tried again."""
    return run.directory.parents[1] / "logs" / f"{run.name}.failed.json"


def lock_of(run: PlannedRun) -> Path:
    """What the processes that work on a run hold."""
    return run.directory.parents[1] / "logs" / f"{run.name}.lock"


@contextlib.contextmanager
def locked(run: PlannedRun) -> Iterator[int | None]:
    """The descriptor of the run's lock, to be handed to its processes; None while others have it."""
    path = lock_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(run: PlannedRun) -> bool:
    """Whether somebody works on it; never takes the lock from one who is about to."""
    try:
        descriptor = os.open(lock_of(run), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def final_loss(run: PlannedRun) -> float | None:
    """Validation loss of a finished run; None if it came to none."""
    loss = (_read(run.directory / "summary.json") or {}).get("final_validation_loss")
    return None if loss is None else float(loss)


def has_diverged(run: PlannedRun) -> bool:
    """Whether the run ended because step after step was not finite, as its last record tells."""
    record = _last_record(run, kind="health")
    return record is not None and record.get("response") == "stop" and not has_finished(run.directory)


def is_settled(run: PlannedRun) -> bool:
    """Whether nothing is left to do: it has finished, or, of a sweep, shown that its rate is too high."""
    return has_finished(run.directory) or (run.role == "sweep" and has_diverged(run))


def check_as_planned(run: PlannedRun) -> None:
    """Raises `FieldError` where the run directory's config is not the planned one."""
    path = run.directory / "config.yaml"
    if not path.exists():
        return
    for field, (planned, found) in find_differences(
        [run.config, load_run_config(path)], ignored=INERT
    ).items():
        raise FieldError(
            field,
            found,
            f"in {path}, where the study now plans {planned}",
            "put the study's file back, remove that run, or choose another directory for the new study",
        )


def status_of(run: PlannedRun, *, job_log: Path | None = None, is_queued: bool = False) -> RunStatus:
    """Where `run` stands.

    Args:
        run: The run.
        job_log: The output of the job that was submitted for it, if one was.
        is_queued: Whether that job still waits or is at work.
    """
    step, step_seconds = _last_step(run)
    if has_finished(run.directory):
        return RunStatus(run, "done", run.config.training.num_steps, step_seconds=step_seconds)
    if is_locked(run) or (is_queued and job_log is not None and job_log.exists()):
        log = log_of(run) if is_locked(run) or job_log is None else job_log
        quiet = time.time() - _last_written(run, log)
        if quiet > 60 * run.config.training.collective_timeout_minutes:
            reason = f"nothing written for {quiet / 60:.0f} minutes; see {log}"
            return RunStatus(run, "stuck", step, reason, step_seconds)
        return RunStatus(run, "running", step, None, step_seconds)
    if is_queued:
        return RunStatus(run, "queued", step, None, step_seconds)
    if is_settled(run):
        return RunStatus(run, "diverged", step, "its rate is too high, which is its result", step_seconds)
    failure = _read(failure_of(run))
    if failure is not None:
        return RunStatus(run, "failed", step, failure.get("reason"), step_seconds)
    if job_log is not None and job_log.exists() and not (run.directory / "stopped.json").exists():
        return RunStatus(run, "failed", step, f"{last_error(job_log)} ({job_log})", step_seconds)
    if step:
        return RunStatus(run, "interrupted", step, "goes on when it is started again", step_seconds)
    waits_for = what_it_waits_for(run)
    return RunStatus(run, "ready" if waits_for is None else "waiting", 0, waits_for)


def what_it_waits_for(run: PlannedRun) -> str | None:
    """What must be there before it can start; None: nothing."""
    if not run.is_ready:
        return "its learning rate is decided by the sweep"
    place = run.config.checkpoint.branch_from
    if place is not None and not (run.directory / "metrics.jsonl").exists() and not Path(place).exists():
        return f"branches off {run.trunk} at step {run.config.training.num_steps - run.own_steps}"
    return None


def last_error(log: Path, *, offset: int = 0) -> str:
    """The line that says why processes ended: their own word, or an exception's, or else the last."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return f"there is no log ({log})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern in _TELLS_WHY:
        for line in reversed(lines):
            if pattern.search(line):
                return line
    return "nothing was printed"


def _last_step(run: PlannedRun) -> tuple[int, float | None]:
    """Step and seconds of the last training record; 0 where there is none."""
    record = _last_record(run, kind="train")
    if record is None:
        return 0, None
    return int(record["step"]), float(record["elapsed_seconds"]) / int(record["step"])


def _last_record(run: PlannedRun, *, kind: str) -> dict[str, Any] | None:
    """The last whole line of the run's metrics, if it is of that kind; of `train`, the last such line."""
    try:
        lines = (run.directory / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record: dict[str, Any] = json.loads(line)
            if record["kind"] == kind:
                return record
            if kind != "train":
                return None
    return None


def _last_written(run: PlannedRun, log: Path) -> float:
    paths = [log, run.directory / "metrics.jsonl", lock_of(run)]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
