"""Jobs of several ranks, started by torchrun or by forks, whose processes can be found and signalled."""

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
# The claims hold with both. torchrun is slower, because it starts an interpreter for each rank.
LAUNCHERS = (FORKED, pytest.param(TORCHRUN, marks=pytest.mark.exhaustive))


# The beginning of a line that reports a step.
MEGATRON_LINE = re.compile(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +\d+/ +\d+ \|")


class Job:
    """A run of several ranks, with its output in `folder`/output; one attempt runs at a time."""

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
        """Start a command; a marker in the environment identifies its processes."""
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment_with(**self._marker, **environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def start_forked(self, *arguments: object, module: str = "sas_megatron") -> None:
        """Start one forked process without a launcher."""
        self._output.write_text("")
        self._process = ForkedCommand(
            *arguments, module=module, stdout=self._output, stderr=subprocess.STDOUT
        )

    def start_ranks(self, num_ranks: int, *arguments: str, module: str = "sas_megatron") -> None:
        """Start ranks with the job's launcher; each runs a module with these arguments."""
        if self.launcher == FORKED:
            self._pids.unlink(missing_ok=True)
            launched = (self._pids, num_ranks, module, *arguments)
            self.start_forked(*launched, module="tests.end_to_end.fork_launcher")
        else:
            handled = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
            options = ("--standalone", handled, f"--nproc-per-node={num_ranks}")
            self.start("torchrun", *options, "-m", module, *arguments)

    def num_records(self) -> int:
        """Count the lines of metrics.jsonl: one per logged step and one per evaluation."""
        metrics = self.run_directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_record(self, number: int) -> None:
        """Wait until metrics.jsonl contains `number` records."""
        deadline = time.monotonic() + 240
        while self.num_records() < number:
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait_for_output(self, text: str, seconds: float) -> None:
        """Wait until the output contains `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self._pid_of(rank), number)

    def signal_launcher(self, number: signal.Signals) -> None:
        """Send a signal to the launcher only."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait for the launcher and return its exit status."""
        return self._process.wait(timeout=seconds)

    def processes(self) -> list[int]:
        """Return the processes of the job that have not ended."""
        if isinstance(self._process, subprocess.Popen):
            return processes_with(**self._marker)
        return _processes_process_session(self._process.pid)

    def output(self) -> str:
        """Return the output of the ranks and the launcher."""
        return self._output.read_text(errors="replace")

    def report(self) -> str:
        """Return the line that reports why training stopped; there must be exactly one."""
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


def _processes_process_session(session: int) -> list[int]:
    """Return the processes that have not ended in the session that a forked command leads."""
    pids = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (process / "stat").read_text()
                state, _, _, process_session, *_ = stat.rpartition(")")[2].split()
                if state != "Z" and int(process_session) == session:
                    pids.append(int(process.name))
    return pids
