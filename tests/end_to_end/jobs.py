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


class Job:
    """A run of some ranks; its processes carry a marker in their environment."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.config = folder / "run.yaml"
        self.run_directory = Path(config.logging.run_directory)
        self.config.write_text(dump_yaml(config))
        self._marker = f"JOB_TEST={uuid.uuid4()}"
        self._output = folder / "output"

    def start(self, *command: str) -> None:
        # The commands of this interpreter first, as in an entered virtual environment.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        name, value = self._marker.split("=")
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PATH": path,
                    "PYTHONPATH": str(ROOT),
                    name: value,
                },
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
        (process,) = [pid for pid in self.processes() if f"RANK={rank}" in _environment(pid)]
        os.kill(process, number)

    def signal_launcher(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self._process.wait(timeout=seconds)

    def processes(self) -> list[int]:
        own = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in own if self._marker in _environment(pid)]

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


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []  # it has ended, or is another user's
