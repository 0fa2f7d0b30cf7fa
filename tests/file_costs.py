"""A pytest plugin that records the processor time of each test file, child processes included."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

from tests.measured_run import FILE_COSTS

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class FileCosts:
    """Appends a JSON object for each test file to the file named by the environment variable FILE_COSTS."""

    def __init__(self) -> None:
        self._file: str | None = None
        self._seconds_at_start = 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Record the cost of the previous file when the first test of another file starts."""
        file = nodeid.partition("::")[0]
        if file != self._file:
            self._record()
            self._file, self._seconds_at_start = file, processor_seconds_of_tree(os.getpid())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Record the cost of the last file."""
        self._record()

    def _record(self) -> None:
        if self._file is None or (path := os.environ.get(FILE_COSTS)) is None:
            return
        seconds = processor_seconds_of_tree(os.getpid()) - self._seconds_at_start
        with Path(path).open("a") as costs:
            costs.write(json.dumps({"file": self._file, "processor_seconds": round(seconds, 2)}) + "\n")


def processor_seconds_of_tree(root: int) -> float:
    """Return the user and system time of a process and its descendants, in seconds.

    Processes that their parent has waited for are included in its time. Orphaned processes are not included;
    `tests/measured_run.py` counts them.
    """
    ticks: dict[int, int] = {}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue  # the process has ended
        # After the name in parentheses: state, parent, ...; fields 14 to 17 of proc(5) are the times.
        fields = stat[stat.rindex(")") + 2 :].split()
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
        children[int(fields[1])].append(int(entry.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += ticks.get(process, 0)
        waiting += children[process]
    return total / _TICKS_PER_SECOND
