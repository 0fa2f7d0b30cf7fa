"""Jobs of several ranks, by a real launcher or a forked one, whose processes can be found and signalled."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.conftest import ROOT
from tests.end_to_end.started_processes import environment_with, processes_with
from tests.fork_server import ForkedCommand

FORKED, TORCHRUN = "forked", "torchrun"
# What a test of ranks claims holds under both: torchrun starts an interpreter for each rank.
LAUNCHERS = (FORKED, pytest.param(TORCHRUN, marks=pytest.mark.exhaustive))


# The beginning of a line that reports a step.
MEGATRON_LINE = re.compile(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +\d+/ +\d+ \|")


class Job:
    """A run of some ranks, one attempt at a time, whose output goes to `folder`/output."""

    def __init__(self, folder: Path, config: RunConfig, *, launcher: str = TORCHRUN) -> None:
        self.config = folder / "run.yaml"
        self.run_directory = Path(config.logging.run_directory)
        self.config.write_text(dump_yaml(config))
        self.launcher = launcher
        self._marker = {"JOB_TEST": str(uuid.uuid4())}
        self._output = folder / "output"
        self._pids = folder / "pids.json"
        self._process: subprocess.Popen[bytes] | ForkedCommand

    def start(self, *command: str, **environment: str) -> None:
        """Start a command line; its processes carry a marker in their environment."""
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment_with(**self._marker, **environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def start_forked(self, *arguments: object, module: str = "sas_megatron") -> None:
        """Start one process without a launcher."""
        self._output.write_text("")
        self._process = ForkedCommand(
            *arguments, module=module, stdout=self._output, stderr=subprocess.STDOUT
        )

    def start_ranks(self, num_ranks: int, *arguments: str, module: str = "sas_megatron") -> None:
        """Run a module with these arguments on each rank, started by the job's launcher."""
        if self.launcher == FORKED:
            self._pids.unlink(missing_ok=True)
            launched = (self._pids, num_ranks, module, *arguments)
            self.start_forked(*launched, module="tests.end_to_end.fork_launcher")
        else:
            handled = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
            options = ("--standalone", handled, f"--nproc-per-node={num_ranks}")
            self.start("torchrun", *options, "-m", module, *arguments)

    def num_records(self) -> int:
        """Count the lines of metrics.jsonl: one for each step, where all are logged, and each evaluation."""
        metrics = self.run_directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_record(self, number: int) -> None:
        """Return once there are so many records."""
        deadline = time.monotonic() + 240
        while self.num_records() < number:
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait_for_output(self, text: str, seconds: float) -> None:
        """Return once the output contains `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self._pid_of(rank), number)

    def signal_launcher(self, number: signal.Signals) -> None:
        """Send a signal to the launcher alone."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Return the launcher's exit status once it has ended."""
        return self._process.wait(timeout=seconds)

    def processes(self) -> list[int]:
        """Return the processes of the job that have not ended."""
        if isinstance(self._process, subprocess.Popen):
            return processes_with(**self._marker)
        return _processes_of_session(self._process.pid)

    def output(self) -> str:
        """Return what the ranks and the launcher have written."""
        return self._output.read_text(errors="replace")

    def report(self) -> str:
        """Return the one line on why training stopped."""
        lines = self.output().splitlines()
        reports = [line for line in lines if line.startswith("sas-megatron: training stopped")]
        assert len(reports) == 1, self.output()
        return reports[0]

    def kill(self) -> None:
        """End all processes of the job."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _pid_of(self, rank: int) -> int:
        if isinstance(self._process, subprocess.Popen):
            (pid,) = processes_with(**self._marker, RANK=str(rank))
            return pid
        return int(json.loads(self._pids.read_text())[rank])


def _processes_of_session(session: int) -> list[int]:
    """Those that have not ended; a forked command leads a session of its own, which its ranks are in."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (process / "stat").read_text()
                state, _, _, of_session, *_ = stat.rpartition(")")[2].split()
                if state != "Z" and int(of_session) == session:
                    found.append(int(process.name))
    return found
