"""Processes forked from one that has imported torch and Megatron-core, which start in 0.1 s instead of 6 s.

Use them to test what a process does. To test how it starts, start a new `python`, as a few tests of each
launcher do.
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
    # The server of Python 3.11 does not inherit sys.path, and ignores a preload that it cannot import.
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
    """Wait for the server to end, so that its processor time is included in that of this process."""
    if fork_context.cache_info().currsize:
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # no public method


class ForkedCommand:
    """A process that runs `python -m MODULE ARGUMENT ...` without the seconds of imports.

    The process has its own working directory, environment, process group and output files, which can be read
    while it runs. It returns the same exit status as the command line, and responds to signals in the same
    way.

    Args:
        *arguments: The arguments after the module's name.
        module: The module to run as `__main__`.
        cwd: The working directory.
        environment: All variables of the process; default: those of this process.
        stdout: The file for standard output; default: a temporary file, see `output`.
        stderr: The same for standard error; `subprocess.STDOUT` redirects it to standard output.
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
        folder = Path(self._folder.name)
        self.args = [module, *map(str, arguments)]
        self._stdout = stdout or folder / "stdout"
        self._stderr = self._stdout if stderr == subprocess.STDOUT else Path(str(stderr or folder / "stderr"))
        for path in (self._stdout, self._stderr):
            path.touch()
        self._process = fork_context().Process(
            target=run_module,
            args=(self.args, str(cwd), dict(environment or os.environ), str(self._stdout), str(self._stderr)),
        )
        self._process.start()
        assert self._process.pid is not None, "a process that was started has an id"
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status (negative: ended by that signal), or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the process has ended.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
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
        """Return the standard output so far."""
        return self._stdout.read_text(errors="replace")

    def errors(self) -> str:
        """Return the standard error so far."""
        return self._stderr.read_text(errors="replace")


def run_command(
    *arguments: object,
    cwd: Path | str = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m sas_megatron ARGUMENT ...` in a forked process; return its status and output.

    Raises:
        subprocess.TimeoutExpired: the process was still running after `timeout` seconds and was killed.
    """
    command = ForkedCommand(*arguments, cwd=cwd, environment=environment)
    try:
        status = command.wait(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(command.args, status, command.output(), command.errors())


def run_module(arguments: list[str], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Run `python -m ARGUMENT ...` in this forked process with a new session, environment and streams."""
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
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # stays open as long as the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = list(arguments)
    # Like `python -m`, search the working directory first.
    sys.path.insert(0, cwd)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        # Like Python, end the process with the signal, so that the exit status states the reason.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
