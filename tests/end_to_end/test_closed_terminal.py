"""A run saves and stops when its terminal closes, unless it was started to ignore SIGHUP."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.fault_tolerance.stop_request import STOP_SIGNALS, STOPPED_STATUS, StopRequest
from tests.conftest import ROOT
from tests.small_data import SmallData

SECONDS = 240


def start_on_a_terminal(config: RunConfig, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start training as the leader of a session whose controlling terminal is new; return its other end."""
    path = folder / "run.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    terminal, end_of_process = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "sas_megatron", "train", str(path)],
        stdin=end_of_process,
        stdout=end_of_process,
        stderr=end_of_process,
        start_new_session=True,
        preexec_fn=take_terminal,
        cwd=ROOT,
    )
    os.close(end_of_process)
    return process, terminal


def read_until_steps(process: subprocess.Popen[bytes], terminal: int, metrics: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.2)[0]:
            os.read(terminal, 65536)


def test_a_run_saves_and_stops_when_its_terminal_closes(small_data: SmallData, tmp_path: Path) -> None:
    config = small_data.run(tmp_path / "run", training={"num_steps": 5000}, evaluation={"interval": None})
    process, terminal = start_on_a_terminal(config, tmp_path)
    try:
        read_until_steps(process, terminal, tmp_path / "run" / "metrics.jsonl")
        os.close(terminal)
        assert process.wait(timeout=SECONDS) == STOPPED_STATUS
    finally:
        process.kill()
        process.wait()
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["exit_reason"] == "signal SIGHUP"
    assert (tmp_path / "run" / "checkpoints" / f"iter_{stopped['step']:07d}").is_dir()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest(after_seconds=None) as request:
            signal.raise_signal(number)
            assert request.reason is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("prefix", "expected"), [([], "handled"), (["nohup"], "ignored")])
def test_the_launch_script_lets_torchrun_handle_sighup_only_if_it_is_not_ignored(
    prefix: list[str], expected: str
) -> None:
    script = "source launch/cluster_variables.sh; if ignores_sighup; then echo ignored; else echo handled; fi"
    done = subprocess.run(
        [*prefix, "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split()[-1] == expected
