"""Run a command and report its processor time, including that of orphaned processes.

usage: python tests/measured_run.py COMMAND [ARGUMENT ...]

`time` and `getrusage` count a process only when its parent waits for it, so they miss daemons, the workers of
a killed launcher and the children of a fork server. This process becomes a child subreaper (`prctl(2)`,
PR_SET_CHILD_SUBREAPER): a process whose parent ends becomes its child, and it waits for all its children.
Processes that outlive the command are an error: they are killed and listed, and the exit status is 1.

The tests append the processor time of each test file to the file that FILE_COSTS names (see
`tests/file_costs.py`); the most expensive ones are printed at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

FILE_COSTS = "SAS_MEGATRON_FILE_COSTS"
NUM_FILES_SHOWN = 10
SECONDS_TO_END = 10.0
_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Run `command` and print the times; return its exit status."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        print("measured_run: cannot become a child subreaper; the processor time is too low", file=sys.stderr)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile(mode="r") as costs:
        process = subprocess.Popen(command, env={**os.environ, FILE_COSTS: costs.name})
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, _frame: process.send_signal(received))
        adopted = _Adopted(process.pid)
        status = adopted.reap_until_command_ends()
        remaining = adopted.end_remaining()
        wall = time.monotonic() - started
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        _print_files([*map(json.loads, costs), *adopted.costs_by_file()])
    user, system = usage.ru_utime, usage.ru_stime
    print(
        f"processor time {user + system:.0f} s (user {user:.0f} s, system {system:.0f} s), "
        f"wall time {wall:.0f} s, of the tests without the setup",
        flush=True,
    )
    for name in remaining:
        print(f"measured_run: still running after the tests, now killed: {name}", file=sys.stderr)
    return status or int(bool(remaining))


class _Adopted:
    """The processes that this one waits for: the command and orphaned processes."""

    def __init__(self, command: int) -> None:
        self._command = command
        self._names: dict[int, str] = {}
        self._files: dict[int, str] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        threading.Thread(target=self._watch, daemon=True).start()

    def reap_until_command_ends(self) -> int:
        """Wait for processes until the command ends; return its exit status as a shell reports it."""
        while True:
            pid, status, usage = os.wait4(-1, 0)
            if pid == self._command:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
            self._record(pid, usage)

    def end_remaining(self) -> list[str]:
        """Wait for processes that outlive the command, kill them after a while; return their names."""
        deadline, remaining = time.monotonic() + SECONDS_TO_END, []
        while True:
            try:
                pid, _, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return remaining
            if pid:
                self._record(pid, usage)
            elif time.monotonic() > deadline:
                for child in _children():
                    remaining.append(
                        f"{_name(child)} (started by {self._files.get(child, 'an unknown test')})"
                    )
                    os.kill(child, signal.SIGKILL)
                deadline = time.monotonic() + SECONDS_TO_END
            else:
                time.sleep(0.05)

    def costs_by_file(self) -> list[dict[str, object]]:
        """Return the processor seconds of orphaned processes, by the test file that started them."""
        return [{"file": file, "processor_seconds": seconds} for file, seconds in self._seconds.items()]

    def _record(self, pid: int, usage: resource.struct_rusage) -> None:
        file = self._files.get(pid, "processes that outlived their parents")
        self._seconds[file] += usage.ru_utime + usage.ru_stime

    def _watch(self) -> None:
        """Record which test started each orphaned process, while its environment can still be read."""
        while True:
            for child in _children():
                if child != self._command and child not in self._files and (file := _test_file(child)):
                    self._files[child] = file
            time.sleep(0.2)


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in listed]


def _test_file(pid: int) -> str | None:
    """Return the file in PYTEST_CURRENT_TEST, which pytest sets and child processes inherit."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    marker = "PYTEST_CURRENT_TEST="
    return next((v.removeprefix(marker).partition("::")[0] for v in variables if v.startswith(marker)), None)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return str(pid)


def _print_files(costs: list[dict[str, object]]) -> None:
    seconds: dict[str, float] = defaultdict(float)
    for cost in costs:
        seconds[str(cost["file"])] += float(str(cost["processor_seconds"]))
    if seconds:
        print("processor seconds of the most expensive test files:")
    for file in sorted(seconds, key=lambda name: -seconds[name])[:NUM_FILES_SHOWN]:
        print(f"{seconds[file]:8.1f}  {file}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
