"""The files in a run's directory, which later stages read instead of logs.

config.yaml     the resolved config         metrics.jsonl   one object per record
run.json        the provenance of the run   summary.json    its results
checkpoints/    tensorboard/                stopped.json    present if the run was stopped and can be resumed
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import socket
import subprocess
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from sas_megatron import __version__
from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer_loading import load_tokenizer, tokenizer_exists
from sas_megatron.fault_tolerance.stop_request import RunExit
from sas_megatron.io.files import write_file
from sas_megatron.io.run_record import RECORD, SCHEMA, RunRecord, damaged_record, read_run_record
from sas_megatron.tracking.rows import list_scalars
from sas_megatron.training.resuming import (
    Branch,
    KeptRecords,
    check_resumable,
    describe_config_repair,
    read_metrics_until,
)

METRICS = "metrics.jsonl"
FILES = ("config.yaml", RECORD, METRICS, "summary.json", "stopped.json")
FOLDERS = ("checkpoints", "tensorboard")
PACKAGES = ("torch", "megatron-core", "deepspeed", "sentencepiece", "pyarrow", "numpy")


class RunFiles:
    """Writes a run's directory; only rank 0 creates an instance.

    Every method that accesses a file raises `FileProblem` if the file system reports an error.
    """

    def __init__(self, config: RunConfig) -> None:
        self.directory = Path(config.logging.run_directory)
        self._with_tensorboard = "tensorboard" in config.logging.trackers
        # Distinguishes this session from others of the run.
        self._session = uuid.uuid4().hex
        self._metrics: TextIO | None = None
        self._tensorboard: Any = None

    @staticmethod
    def checkpoints(config: RunConfig) -> Path:
        """Return the folder of a run's checkpoints."""
        return Path(config.logging.run_directory) / "checkpoints"

    @staticmethod
    def check_directory(config: RunConfig) -> None:
        """Check that the run directory is writable, and that it is new or holds a run that can be resumed.

        Raises:
            FieldError: It holds a run and `checkpoint.resume` is off, or its run has another config or data.
            FileProblem: It cannot be written, or one of its files is damaged.
        """
        directory = Path(config.logging.run_directory)
        _check_kinds(directory)
        if (directory / METRICS).exists() and config.checkpoint.resume is False:
            raise FieldError(
                "logging.run_directory",
                directory,
                "already holds a run",
                "set checkpoint.resume=auto to resume it, or choose another directory",
                ("checkpoint.resume=auto",),
            )
        if config.checkpoint.resume is not False:
            check_resumable(config)
        existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise FileProblem(
                directory,
                f"cannot be written ({existing} is {'not writable' if existing.is_dir() else 'a file'})",
                "choose another logging.run_directory",
            )

    def open(
        self,
        config: RunConfig,
        provenance: dict[str, Any],
        *,
        resumed_step: int,
        branch: Branch | None = None,
    ) -> list[str]:
        """Create the files, or reopen them and drop the records after `resumed_step`, which are repeated.

        Args:
            config: The run.
            provenance: This session's entry of run.json.
            resumed_step: The step of the restored checkpoint; 0 without one.
            branch: The branch of a new run, which starts with the trunk's records.

        Returns:
            A line for each repair of a file.

        Raises:
            FileProblem: The files cannot be written.
        """
        with _accessing(self.directory):
            return self._open(config, provenance, resumed_step=resumed_step, branch=branch)

    def _open(
        self, config: RunConfig, provenance: dict[str, Any], *, resumed_step: int, branch: Branch | None
    ) -> list[str]:
        self.directory.mkdir(parents=True, exist_ok=True)
        previous = read_run_record(self.directory)
        config_repair = describe_config_repair(config) if resumed_step and branch is None else None
        # They describe the end of a session, and this session has just started.
        for name in ("stopped.json", "summary.json"):
            (self.directory / name).unlink(missing_ok=True)
        resolved = dump_yaml(config)
        write_file(self.directory / "config.yaml", resolved)
        self._write_provenance(resolved, provenance, resumed_step, previous=previous)
        self._copy_tokenizer(config)
        metrics = self.directory / METRICS
        if branch is not None:
            kept = branch.read_metrics(config)
        elif metrics.exists():
            kept = read_metrics_until(metrics, resumed_step)
        else:
            kept = KeptRecords([])
        write_file(metrics, "".join(line + "\n" for line in kept.lines))
        self._metrics = metrics.open("a", encoding="utf-8")
        if self._with_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Also from step 0: an earlier session may have recorded steps before the first checkpoint.
            self._tensorboard = SummaryWriter(
                str(self.directory / "tensorboard"), purge_step=resumed_step + 1
            )
            if branch is not None:
                for line in kept.lines:
                    self._add_scalars(json.loads(line))
        repairs = [] if config_repair is None else [config_repair]
        if resumed_step and branch is None and (previous is None or not previous.sessions):
            repairs.append(
                f"{self.directory / RECORD}: has no record of earlier sessions; a new one was begun"
                + ("" if previous else ", and the data were not compared with those of earlier sessions")
            )
        return [*repairs, *_describe_left_out(metrics, kept, resumed_step)]

    def write_record(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl without buffering it, and its numbers to TensorBoard.

        Raises:
            FileProblem: The file cannot be written.
        """
        assert self._metrics is not None, "call open() first"
        with _accessing(self.directory / METRICS):
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        self._add_scalars(record)

    def _add_scalars(self, record: dict[str, Any]) -> None:
        if self._tensorboard is not None:
            for tag, value in list_scalars(record).items():
                self._tensorboard.add_scalar(tag, value, record["step"])

    def sync(self) -> None:
        """Wait until the records are on disk, so that no checkpoint exists without the records before it.

        Raises:
            FileProblem: The file cannot be synced.
        """
        assert self._metrics is not None, "call open() first"
        with _accessing(self.directory / METRICS):
            os.fsync(self._metrics.fileno())

    def check_session(self) -> None:
        """Check that no other session of the run has started since; that session would own the files.

        This happens if a scheduler loses contact with a node and restarts the run elsewhere while the
        processes on that node still run.

        Raises:
            FileProblem: Another session has started, or run.json cannot be read.
        """
        path = self.directory / RECORD
        with _accessing(path):
            path.stat()
        record = read_run_record(self.directory)
        if record is None or not record.sessions:
            raise damaged_record(path, "the session of this process is missing")
        newest = record.sessions[-1]
        if newest.session != self._session:
            raise FileProblem(
                path,
                f"contains a newer session, started on {newest.host} at {newest.started_at}",
                "let that session continue, or stop it and resume with checkpoint.resume=true",
            )

    def has_summary(self) -> bool:
        """Return whether summary.json exists and is readable."""
        try:
            return isinstance(json.loads((self.directory / "summary.json").read_bytes()), dict)
        except (OSError, ValueError, RecursionError):
            return False

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json and close the other files.

        Raises:
            FileProblem: The file cannot be written.
        """
        with _accessing(self.directory / "summary.json"):
            write_file(self.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.close()

    def write_stop(self, run_exit: RunExit, *, step: int) -> None:
        """Write stopped.json, which exists only until the run is resumed.

        Raises:
            FileProblem: The file cannot be written.
        """
        record = {"exit_reason": run_exit.reason, "exit_status": run_exit.exit_status, "step": step}
        with _accessing(self.directory / "stopped.json"):
            write_file(self.directory / "stopped.json", json.dumps(record) + "\n")

    def close(self) -> None:
        """Close metrics.jsonl and TensorBoard."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # already raised when the record was written
                self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _copy_tokenizer(self, config: RunConfig) -> None:
        """Keep the tokenizer with the run, for commands that read the run where the path does not exist."""
        if not tokenizer_exists(config.data.tokenizer):  # a test may train without one
            return
        tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
        for name, content in tokenizer.files.items():
            copy = self.directory / name
            if not (copy.is_file() and copy.read_bytes() == content):
                write_file(copy, content)

    def _write_provenance(
        self, resolved: str, provenance: dict[str, Any], resumed_step: int, *, previous: RunRecord | None
    ) -> None:
        path = self.directory / RECORD
        sessions = [] if previous is None else previous.list_sessions()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        sessions.append(
            {
                "schema": SCHEMA,
                "session": self._session,
                "host": socket.gethostname(),
                "started_at": started,
                "from_step": resumed_step,
                **provenance,
            }
        )
        # A session that started at step 0 loaded the initial weights; the last one counts.
        initial_weights = [
            session.get("initial_weights") for session in sessions if session["from_step"] == 0
        ]
        record = {
            **sessions[-1],
            "started_at": sessions[0]["started_at"],
            # That of the first session, so that all sessions are one run of a tracker.
            "run_id": sessions[0]["session"],
            "initial_weights": initial_weights[-1] if initial_weights else None,
            "config_sha256": hashlib.sha256(resolved.encode()).hexdigest(),
            "sessions": sessions,
        }
        write_file(path, json.dumps(record, indent=2) + "\n")


def _check_kinds(directory: Path) -> None:
    """Check that no file of a run directory is a folder, and no folder a file.

    Raises:
        FileProblem: One of them is.
    """
    remedy = "remove it, or choose another logging.run_directory"
    for name in FILES:
        if (directory / name).exists() and not (directory / name).is_file():
            raise FileProblem(directory / name, "is not a regular file", remedy)
    for name in FOLDERS:
        if (directory / name).exists() and not (directory / name).is_dir():
            raise FileProblem(directory / name, "is not a folder", remedy)


def _describe_left_out(metrics: Path, kept: KeptRecords, resumed_step: int) -> list[str]:
    """Return a line for each kind of records that are not in the metrics of a run that is opened."""
    lines = []
    if kept.num_later:
        lines.append(f"removed {kept.num_later} records after step {resumed_step}, which is resumed")
    if kept.num_unreadable:
        lines.append(f"removed {kept.num_unreadable} unreadable lines")
    if resumed_step and not kept.lines:
        lines.append(f"has no records up to step {resumed_step}")
    return [f"{metrics}: {line}" for line in lines]


def _accessing(path: Path) -> AbstractContextManager[None]:
    """Translate an error of the file system in the block into a `FileProblem` of `path`."""
    return translate_os_errors(
        path,
        problem="cannot be read or written",
        remedy="free disk space or fix the file system, then resume with checkpoint.resume=true",
    )


def describe_software() -> dict[str, Any]:
    """Return the versions of the packages that affect results, and the commit of the source tree."""
    versions: dict[str, str | None] = {"sas-megatron": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"packages": versions, "git": _describe_git()}


def _describe_git() -> str | None:
    """Return the commit of the package's source, marked if it is modified; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
