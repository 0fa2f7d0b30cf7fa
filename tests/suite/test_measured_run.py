"""The wrapper of the test command counts the time of every process and leaves none running."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.file_costs import FileCosts, processor_seconds_of_tree
from tests.measured_run import FILE_COSTS

# Processor seconds of each process below.
BUSY_SECONDS = 0.6
# /proc counts user and system time in hundredths of a second, each rounded down.
ROUNDING_SECONDS = 0.05
BUSY = f"import time\nwhile time.process_time() < {BUSY_SECONDS}: pass\n"
# Starts a process whose parent ends immediately, like a daemon.
ORPHAN = (
    "import os, sys\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    os.execv(sys.executable, [sys.executable, '-c', {source!r}])\n"
)


def measured(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tests/measured_run.py", sys.executable, "-c", source],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def processor_seconds(output: str) -> float:
    (found,) = re.findall(r"processor time (\d+) s \(user", output)
    return float(found)


def test_the_time_of_an_orphaned_process_is_counted() -> None:
    # Three orphans, since the time is printed in full seconds.
    done = measured(
        3 * ORPHAN.format(source=BUSY), PYTEST_CURRENT_TEST="tests/some/test_file.py::test (call)"
    )
    assert done.returncode == 0, done.stderr
    # The fork in the first statement runs only its own orphan; the parent starts all three.
    assert processor_seconds(done.stdout) >= round(3 * BUSY_SECONDS) - 1
    (file_seconds,) = re.findall(r"^ *([\d.]+)  tests/some/test_file\.py$", done.stdout, re.MULTILINE)
    assert float(file_seconds) >= 3 * (BUSY_SECONDS - ROUNDING_SECONDS)


@pytest.mark.parametrize(
    ("source", "status"), [("raise SystemExit(5)", 5), ("import os; os.kill(os.getpid(), 15)", 143)]
)
def test_the_exit_status_equals_that_of_the_command(source: str, status: int) -> None:
    assert measured(source).returncode == status


def test_a_process_that_outlives_the_command_is_killed_and_listed() -> None:
    from tests import measured_run

    source = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests import measured_run\n"
        "measured_run.SECONDS_TO_END = 0.5\n"
        "sleeper = 'import time; time.sleep(600)  # left behind'\n"
        f"orphan = {ORPHAN!r}.format(source=sleeper)\n"
        "sys.exit(measured_run.main([sys.executable, '-c', orphan]))\n"
    )
    assert measured_run.SECONDS_TO_END >= 5, "daemons need some seconds to end"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.search(r"now killed: \S+ -c import time; time\.sleep\(600\)  # left behind", done.stderr)


def test_the_time_of_children_counts_for_the_test_file_that_started_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FILE_COSTS, str(tmp_path / "costs"))
    costs = FileCosts()
    costs.pytest_runtest_logstart("tests/a/test_a.py::test_one")
    running = subprocess.Popen([sys.executable, "-c", BUSY + "time.sleep(600)"])
    try:
        subprocess.run([sys.executable, "-c", BUSY], check=True)
        start_time = time.monotonic()
        while processor_seconds_of_tree(running.pid) < BUSY_SECONDS - ROUNDING_SECONDS:
            assert time.monotonic() - start_time < 60
            time.sleep(0.05)
        costs.pytest_runtest_logstart("tests/a/test_a.py::test_two")
        costs.pytest_runtest_logstart("tests/b/test_b.py::test_one")
        costs.pytest_sessionfinish()
    finally:
        running.kill()
        running.wait()
    first, second = map(json.loads, (tmp_path / "costs").read_text().splitlines())
    assert (first["file"], second["file"]) == ("tests/a/test_a.py", "tests/b/test_b.py")
    assert first["processor_seconds"] >= 2 * (BUSY_SECONDS - ROUNDING_SECONDS)
    assert second["processor_seconds"] < BUSY_SECONDS
