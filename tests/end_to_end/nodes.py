"""Several nodes of one run on this machine: each node is a launcher, whose processes can be found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import dump_yaml
from tests.conftest import ROOT
from tests.end_to_end.started_processes import environment_with, processes_with
from tests.small_data import SmallData

# Added to time limits, for a busy machine.
MARGIN_SECONDS = 30
RUN_SECONDS = 240
# Time limit for an error message.
SECONDS_TO_REPORT = 60


class Nodes:
    """Commands that run concurrently, each with its output in a file, and the processes that they start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        # deepspeed forwards variables over ssh only if their names start with PYTHON (among others).
        self._mark = {"PYTHON_TEST_RUN": uuid.uuid4().hex}

    def start(self, *command: str, **environment: str) -> None:
        with self._output(len(self.started)).open("wb") as output:
            self.started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment_with(**self._mark, **environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def wait(self, seconds: float = RUN_SECONDS) -> list[int]:
        """Wait for all commands and return their exit statuses in order."""
        deadline = time.monotonic() + seconds
        try:
            return [node.wait(timeout=max(1, deadline - time.monotonic())) for node in self.started]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output()) from None

    def wait_until(self, condition: Callable[[], object], seconds: float = RUN_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def output(self, node: int | None = None) -> str:
        """Return the output of one command, or of all."""
        numbers = range(len(self.started)) if node is None else [node]
        return "\n".join(self._output(number).read_text(errors="replace") for number in numbers)

    def processes(self, **environment: str) -> list[int]:
        """Return the processes of these commands that have these variables in their environment."""
        return processes_with(**self._mark, **environment)

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self.started:
            node.wait()

    def _output(self, node: int) -> Path:
        return self.folder / f"output-{node}"


@contextlib.contextmanager
def started_nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.kill()


def write_config(small_data: SmallData, folder: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """Write the config of a run on two ranks that takes a few seconds.

    Its run directory is `folder`/`name`; `sections` override its fields.
    """
    sections = {"parallel": {"tensor": 2}, "training": {"num_steps": 4}, **sections}
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(small_data.run(folder / name, **sections)))
    return path


def losses(run_directory: Path) -> list[float]:
    return [record["train_loss"] for record in _steps(run_directory)]


def steps(run_directory: Path) -> list[int]:
    return [record["step"] for record in _steps(run_directory)]


def world_size(run_directory: Path) -> int:
    size: int = json.loads((run_directory / "summary.json").read_text())["world_size"]
    return size


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _steps(run_directory: Path) -> list[dict[str, Any]]:
    path = run_directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if record["kind"] == "train"]
