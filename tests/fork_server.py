"""Processes forked from one that has imported torch and Megatron-core: they start in 0.1 s instead of 6 s.

Use it where a test is about what a process does, not about how it starts. A few tests of each launcher start
`python` anew.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


@functools.cache
def fork_context() -> multiprocessing.context.ForkServerContext:
    """Return a multiprocessing context; the server starts with the first call and ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded_modules"])
    path = os.environ.get("PYTHONPATH")
    # Python 3.11's server does not take the parent's sys.path, and ignores a preload that it cannot import.
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    return context


def stop_fork_server() -> None:
    """Wait for the server to end, so that its processor time is in that of this process."""
    if fork_context.cache_info().currsize:
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # no public method


class ForkedCommand:
    """`python -m MODULE ARGUMENT ...` in a process of its own, without the seconds of imports.

    The process has its own working directory, environment, process group and output files, which can be read
    while it runs. Its exit status and its response to signals are those of the command line.

    Args:
        *arguments: those after the module's name.
        module: run as `__main__`.
        cwd: working directory.
        environment: all variables of the process; default: those of this process.
        stdout: file to which standard output goes; default: a temporary file, see `output`.
        stderr: the same for standard error; `subprocess.STDOUT` joins it to standard output.
    """

    def __init__(
        self,
        *arguments: object,
        module: str = "sas_megatron",
        cwd: Path | str = ROOT,
        environment: Mapping[str, str] | None = None,
        stdout: Path | None = None,
        stderr: Path | int | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        own = Path(self._folder.name)
        self.args = [module, *map(str, arguments)]
        self._stdout = stdout or own / "stdout"
        self._stderr = self._stdout if stderr == subprocess.STDOUT else Path(str(stderr or own / "stderr"))
        for path in (self._stdout, self._stderr):
            path.touch()
        self._process = fork_context().Process(
            target=run_module,
            args=(self.args, str(cwd), dict(environment or os.environ), str(self._stdout), str(self._stderr)),
        )
        self._process.start()
        assert self._process.pid is not None, "a started process has an id"
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the process has ended.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process with SIGKILL, and wait for it."""
        self.send_signal(signal.SIGKILL)
        self._process.join()

    def output(self) -> str:
        """Return what standard output has received so far."""
        return self._stdout.read_text(errors="replace")

    def errors(self) -> str:
        """Return what standard error has received so far."""
        return self._stderr.read_text(errors="replace")


def run_command(
    *arguments: object,
    cwd: Path | str = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m sas_megatron ARGUMENT ...` in a forked process; return its status and output.

    Raises:
        subprocess.TimeoutExpired: it was still running after `timeout` seconds, and is killed.
    """
    command = ForkedCommand(*arguments, cwd=cwd, environment=environment)
    try:
        status = command.wait(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(command.args, status, command.output(), command.errors())


def run_module(arguments: list[str], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Run `python -m ARGUMENT ...` in this forked process, with its own session, variables and streams."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for descriptor, path in ((1, stdout), (2, stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for the life of the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = list(arguments)
    # As `python -m` has it: the working directory before all else.
    sys.path.insert(0, cwd)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        # Python ends itself with the signal, so that a shell knows the reason.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
