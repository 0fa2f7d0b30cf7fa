"""`sas-megatron` whose `study run` forks its training processes instead of starting new interpreters.

Run it with `ForkedCommand(..., module="tests.scaling.study.forked_runs")`. Locks, sessions, logs, signals and
exit statuses are those of the product; only the imports of each training process are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import IO, Any

from sas_megatron.cli.main import main
from sas_megatron.scaling.study import runner
from tests.fork_server import run_module


class ForkedTraining:
    """The part of `subprocess.Popen` that the study runner uses."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        pass_fds: Sequence[int],
        start_new_session: bool,
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "sas_megatron"], command
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        self.returncode: int | None = None
        log = os.readlink(f"/proc/self/fd/{stdout.fileno()}")
        self.pid = os.fork()
        if self.pid == 0:
            _close_all_but({0, 1, 2, *pass_fds})
            os._exit(_train(list(command[2:]), dict(env), log))

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue  # the descriptor of the listing itself


def _train(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Run `python -m sas_megatron ARGUMENT ...` in this process; return its exit status."""
    status: Any = 0
    try:
        run_module(arguments, os.getcwd(), environment, log, log)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    runner.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=ForkedTraining, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    main()
