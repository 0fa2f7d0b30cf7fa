"""Forked commands behave like commands of a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fork_server import ForkedCommand, fork_context, run_command

PROBE = """
import os, signal, sys, time
assert "megatron.core" in sys.modules
print(sys.argv[1:], os.getcwd(), os.environ.get("NAME"), sys.stdin.read() == "")
print("a message", file=sys.stderr)
if "wait" in sys.argv:
    print("waiting", flush=True)
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


def test_a_command_has_its_own_working_directory_variables_streams_and_status(probe: Path) -> None:
    command = ForkedCommand(7, "b c", module="probe", cwd=probe, environment={**os.environ, "NAME": "value"})
    assert command.wait(60) == 7
    assert command.output() == f"['7', 'b c'] {probe} value True\n"
    assert command.errors() == "a message\n"


def test_both_streams_can_be_written_to_one_file(probe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ForkedCommand(0, module="probe", cwd=probe, stdout=log, stderr=subprocess.STDOUT)
    assert command.wait(60) == 0
    assert sorted(log.read_text().splitlines()) == ["['0'] " + f"{probe} None True", "a message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_has_the_same_effect_as_on_python(probe: Path, number: signal.Signals) -> None:
    command = ForkedCommand(0, "wait", module="probe", cwd=probe)
    deadline = time.monotonic() + 60
    while "waiting" not in command.output():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert command.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(0.01)
    command.send_signal(number)
    assert command.wait(60) == -number
    assert ("KeyboardInterrupt" in command.errors()) == (number == signal.SIGINT)


def test_an_error_of_the_product_gives_its_status_and_message(tmp_path: Path) -> None:
    done = run_command("costs", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_server_has_one_thread() -> None:
    """Check the number of threads, since a fork of a process with several threads may hang."""
    receiver, sender = fork_context().Pipe()
    process = fork_context().Process(target=_send_threads, args=(sender,))
    process.start()
    assert receiver.recv() == 1
    process.join()


def _send_threads(sender: object) -> None:
    sender.send(len(os.listdir(f"/proc/{os.getppid()}/task")))  # type: ignore[attr-defined]
