"""Jobs as a user starts them, under torchrun or bare, whose processes can be found and signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.conftest import ROOT
from tests.end_to_end.started_processes import environment_with, processes_with


class Job:
    """A run of some ranks; its processes carry a marker in their environment."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.config = folder / "run.yaml"
        self.run_directory = Path(config.logging.run_directory)
        self.config.write_text(dump_yaml(config))
        self._marker = {"JOB_TEST": str(uuid.uuid4())}
        self._output = folder / "output"

    def start(self, *command: str) -> None:
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment_with(**self._marker),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def start_by_script(self, ranks: int, *overrides: str) -> None:
        self.start("launch/torchrun.sh", str(ranks), str(self.config), *overrides)

    def start_bare(self, *overrides: str) -> None:
        self.start(sys.executable, "-m", "sas_megatron", "train", str(self.config), *overrides)

    def start_entry(self, source: str, *arguments: str, num_ranks: int) -> None:
        """Runs a script of that source on each rank, with `arguments` and the config's path."""
        entry = self.config.with_name("entry.py")
        entry.write_text(source)
        ranks = f"--nproc-per-node={num_ranks}"
        self.start("torchrun", "--standalone", ranks, str(entry), *arguments, str(self.config))

    def num_records(self) -> int:
        """In metrics.jsonl: a step each, where all are logged, and an evaluation."""
        metrics = self.run_directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_record(self, number: int) -> None:
        deadline = time.monotonic() + 240
        while self.num_records() < number:
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait_for_output(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        (process,) = processes_with(**self._marker, RANK=str(rank))
        os.kill(process, number)

    def signal_launcher(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self._process.wait(timeout=seconds)

    def processes(self) -> list[int]:
        return processes_with(**self._marker)

    def output(self) -> str:
        return self._output.read_text()

    def report(self) -> str:
        lines = self.output().splitlines()
        reports = [line for line in lines if line.startswith("sas-megatron: training stopped")]
        assert len(reports) == 1, self.output()
        return reports[0]

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
