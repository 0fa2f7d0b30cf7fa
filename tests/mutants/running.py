"""Run the tests on a copy of the checkout that contains one fault."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.results import Outcome

# The option of tests/conftest.py that selects every test.
ALL_TESTS = "--all"
# Marks the processes of a run in their environment, since some tests start processes in new sessions.
MARK = "SAS_MEGATRON_MUTATION_RUN"
# Largest number of tests per fault that are deselected because they also fail without the fault.
MOST_DESELECTED = 10
POLL_SECONDS = 0.2
# pytest's exit statuses: 1 a test failed; 2 tests could not be collected; 4 conftest.py could not be
# imported. None stands for the time limit.
_COLLECTION_STATUSES, _FAILING_STATUSES = (2, 4), (None, 1, 2)
_FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (?P<test>[^\s\[]+(?:\[.*?\](?= - |$))?)", re.MULTILINE)


class Interrupted(Exception):
    """The tool received a stop signal."""


@dataclass(frozen=True)
class Selection:
    """The options with which pytest runs for each fault.

    `confirms`: a test that fails is run again without the fault, and does not count if it fails again.
    """

    all_tests: bool
    limit_seconds: float
    confirms: bool


@dataclass(frozen=True)
class Measured:
    """The outcome of the tests for a fault."""

    outcome: Outcome
    test: str | None
    seconds: float


class Scratch:
    """A copy of the tracked files of the checkout, in which faults are applied one after another."""

    def __init__(self, folder: Path, selection: Selection, stop: threading.Event) -> None:
        self._checkout = folder / "checkout"
        self._temporary = folder / "tmp"
        self._selection = selection
        self._stop = stop
        self._deselected: list[str] = []
        copy_tracked_files(self._checkout)

    def measure(self, mutant: Mutant, tests: Sequence[str]) -> Measured:
        """Run tests, given as files and folders, with the fault."""
        start_time = time.monotonic()
        while True:
            deselect = [f"--deselect={test}" for test in self._deselected]
            with self._applied(mutant):
                status, output = self._run_pytest([*deselect, *tests])
            outcome, test = judge(status, output)
            if outcome == "survived" or test is None or not self._fails_anyway(outcome, test):
                return Measured(outcome, test, time.monotonic() - start_time)
            if len(self._deselected) == MOST_DESELECTED or test in self._deselected:
                return Measured("not measured", test, time.monotonic() - start_time)
            self._deselected.append(test)

    def _fails_anyway(self, outcome: Outcome, test: str) -> bool:
        if not self._selection.confirms:
            return False
        status, _ = self._run_pytest(["--collect-only", test] if outcome == "broken" else [test])
        return status in _FAILING_STATUSES

    @contextlib.contextmanager
    def _applied(self, mutant: Mutant) -> Iterator[None]:
        path = self._checkout / mutant.path
        source = path.read_text(encoding="utf-8")
        self._write(path, mutant.mutate(source))
        try:
            yield
        finally:
            self._write(path, source)

    @staticmethod
    def _write(path: Path, source: str) -> None:
        path.write_text(source, encoding="utf-8")
        # Python compares sizes and times in seconds, which may be equal for two versions.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def _run_pytest(self, arguments: Sequence[str]) -> tuple[int | None, str]:
        """Return pytest's exit status, None after the time limit, and its output."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
        command += ["-rfE", "--color=no", *([ALL_TESTS] if self._selection.all_tests else []), *arguments]
        with (self._temporary / "output").open("w+b") as output:
            process = subprocess.Popen(
                command,
                cwd=self._checkout,
                env=self._environment(mark),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = self._wait(process)
            finally:
                end_processes(process, mark)
            output.seek(0)
            return status, output.read().decode(errors="replace")

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        deadline = time.monotonic() + self._selection.limit_seconds
        while process.poll() is None:
            if self._stop.is_set():
                raise Interrupted
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)
        return process.returncode

    def _environment(self, mark: str) -> dict[str, str]:
        """Return variables with which Python imports the copy, and each run has new caches."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        home = Path(environment.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        environment.setdefault("HF_HOME", str(home / "huggingface"))
        # With it the launch scripts use this environment instead of building one.
        environment.setdefault("SAS_MEGATRON_VENV", sys.prefix)
        return environment | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
            "PYTHONPATH": str(self._checkout),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._temporary),
            "XDG_CACHE_HOME": str(self._temporary / "cache"),
            MARK: mark,
        }


def judge(status: int | None, output: str) -> tuple[Outcome, str | None]:
    """Return the outcome and the first failure from pytest's exit status and output."""
    if status is None:
        return "timed out", None
    found = _FIRST_FAILURE.search(output)
    test = found["test"] if found else None
    if status == 0:
        return "survived", None
    if status in _COLLECTION_STATUSES and (test is None or "::" not in test):
        return "broken", test
    # 5: no test was collected.
    return ("not measured", None) if status == 5 else ("caught", test)


def end_processes(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the process group of a run, and processes of its tests in other sessions."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    marked = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # A process may have ended already, or belong to another user.
            with contextlib.suppress(OSError):
                if marked in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def copy_tracked_files(folder: Path) -> None:
    """Copy the tracked files of the checkout in their current state in the working tree."""
    for name in _git("ls-files", "-z").split("\0"):
        source = ROOT / name
        if name and (source.is_file() or source.is_symlink()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def describe_commit() -> str:
    """Return the commit of the checkout, with a hash of the uncommitted changes if there are any."""
    commit = _git("rev-parse", "HEAD").strip()
    if not (difference := _git("diff", "HEAD")):
        return commit
    return f"{commit}-{uuid.uuid5(uuid.NAMESPACE_OID, difference).hex[:12]}"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout
