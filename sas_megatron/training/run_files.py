"""The files of a run: what the next stage reads, in place of logs.

config.yaml     the resolved config         metrics.jsonl   one object a logged step
run.json        where it came from          summary.json    what came out
checkpoints/    tensorboard/                stopped.json    the run is to be gone on with
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sas_megatron import __version__
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.data.writing import write_file
from sas_megatron.fault_tolerance.stop_request import Ending
from sas_megatron.training.resuming import Branch, check_goes_on, read_until

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "megatron-core", "deepspeed", "sentencepiece", "pyarrow", "numpy")


class RunFiles:
    """Writes a run's directory; only rank 0 has one.

    Every method that reads or writes there raises `FileProblem` where that cannot be done.
    """

    def __init__(self, config: RunConfig) -> None:
        self.directory = Path(config.logging.run_directory)
        self._with_tensorboard = config.logging.tensorboard
        # Tells this session from others of the run.
        self._session = uuid.uuid4().hex
        self._metrics: TextIO | None = None
        self._tensorboard: Any = None

    @staticmethod
    def checkpoints(config: RunConfig) -> Path:
        """The folder of a run's checkpoints."""
        return Path(config.logging.run_directory) / "checkpoints"

    @staticmethod
    def check_directory(config: RunConfig) -> None:
        """Before anything is built: the run directory must be new, or be gone on with, and be writable.

        Raises:
            FieldError: it holds a run and `checkpoint.resume` is off.
            FileProblem: it cannot be written.
        """
        directory = Path(config.logging.run_directory)
        if (directory / METRICS).exists() and not config.checkpoint.resume:
            raise FieldError(
                "logging.run_directory",
                directory,
                "holds a run already",
                "set checkpoint.resume=true to go on with it, or choose another directory",
            )
        if config.checkpoint.resume:
            check_goes_on(config)
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
    ) -> None:
        """Starts or goes on with the files; records after `resumed_step` are dropped, they come again.

        Of a new run that is a branch, those of the trunk until then are its own.
        """
        with _at_hand(self.directory):
            self._open(config, provenance, resumed_step=resumed_step, branch=branch)

    def _open(
        self, config: RunConfig, provenance: dict[str, Any], *, resumed_step: int, branch: Branch | None
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # They tell of a session that has ended, and this one has not.
        for name in ("stopped.json", "summary.json"):
            (self.directory / name).unlink(missing_ok=True)
        resolved = dump_yaml(config)
        write_file(self.directory / "config.yaml", resolved)
        self._write_provenance(resolved, provenance, resumed_step)
        metrics = self.directory / METRICS
        if branch is not None:
            kept = branch.read_metrics(config)
        elif metrics.exists():
            kept = read_until(metrics, resumed_step)
        else:
            kept = []
        write_file(metrics, "".join(line + "\n" for line in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        if self._with_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self.directory / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
            )

    def record(self, record: dict[str, Any]) -> None:
        """Appends one object to metrics.jsonl, at once on disk, and its losses to TensorBoard."""
        assert self._metrics is not None, "open() comes first"
        with _at_hand(self.directory / METRICS):
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def sync(self) -> None:
        """Waits until the records are on disk: a checkpoint must not outlive those before it."""
        assert self._metrics is not None, "open() comes first"
        with _at_hand(self.directory / METRICS):
            os.fsync(self._metrics.fileno())

    def check_is_own(self) -> None:
        """Raises `FileProblem` where another session of the run has begun since, whose files these are then.

        A scheduler that lost sight of a node starts the run elsewhere, while its processes may go on.
        """
        path = self.directory / "run.json"
        with _at_hand(path):
            newest = json.loads(path.read_text(encoding="utf-8"))["sessions"][-1]
        if newest["session"] != self._session:
            begun = f"on {newest['host']} at {newest['started_at']}"
            raise FileProblem(
                path,
                f"tells of a session that began {begun}, after this one",
                "leave the run to it, or stop it and go on with checkpoint.resume=true",
            )

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json and closes the other files."""
        with _at_hand(self.directory / "summary.json"):
            write_file(self.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.close()

    def write_stop(self, ending: Ending, *, step: int) -> None:
        """Writes stopped.json, which is there only while the run waits to be gone on with."""
        record = {"exit_reason": ending.reason, "exit_status": ending.exit_status, "step": step}
        with _at_hand(self.directory / "stopped.json"):
            write_file(self.directory / "stopped.json", json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes what is open."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what could not be written was told when it was to be
                self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write_provenance(self, resolved: str, provenance: dict[str, Any], resumed_step: int) -> None:
        path = self.directory / "run.json"
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        sessions.append(
            {
                "session": self._session,
                "host": socket.gethostname(),
                "started_at": started,
                "from_step": resumed_step,
                **provenance,
            }
        )
        # Each that began anew: the last of those is what the run has come from.
        begun_with = [session.get("initial_weights") for session in sessions if session["from_step"] == 0]
        record = {
            **sessions[-1],
            "started_at": sessions[0]["started_at"],
            "initial_weights": begun_with[-1] if begun_with else None,
            "config_sha256": hashlib.sha256(resolved.encode()).hexdigest(),
            "sessions": sessions,
        }
        write_file(path, json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def _at_hand(path: Path) -> Iterator[None]:
    """Turns what the file system has against reading or writing at `path` into a `FileProblem`."""
    try:
        yield
    except OSError as error:
        raise FileProblem(
            path,
            f"cannot be read or written ({error.strerror or error})",
            "make room or mend the file system, then go on with checkpoint.resume=true",
        ) from error


def describe_software() -> dict[str, Any]:
    """Versions of the packages that decide results, and the state of the source tree."""
    versions: dict[str, str | None] = {"sas-megatron": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"packages": versions, "git": _describe_git()}


def _describe_git() -> str | None:
    """Commit of the package's source, marked where it was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
