"""Tests that locks exclude other processes, and that work continues on file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sas_megatron.io import file_locks
from sas_megatron.io.file_locks import acquire_file_lock
from tests.conftest import ROOT
from tests.fork_server import ForkedCommand
from tests.selection import cases
from tests.small_data import SmallData

MISSING = {
    errno.ENOSYS: "Function not implemented",
    errno.ENOLCK: "No locks available",
    errno.EOPNOTSUPP: "Operation not supported",
}


def test_a_lock_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert acquire_file_lock(first)
    assert not acquire_file_lock(second)
    assert not acquire_file_lock(second, shared=True)
    os.close(first)
    third = os.open(tmp_path / "lock", os.O_RDWR)
    assert acquire_file_lock(second, shared=True)
    assert acquire_file_lock(third, shared=True)
    assert not acquire_file_lock(third)
    os.close(second)
    assert acquire_file_lock(third, wait=True)
    os.close(third)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_locks_of_nfs_that_are_held_are_not_taken_for_missing_ones(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not acquire_file_lock(0)


@pytest.mark.parametrize("number", cases(MISSING, default=[errno.ENOSYS]))
def test_data_are_prepared_without_locks(small_data: SmallData, tmp_path: Path, number: int) -> None:
    (tmp_path / "text.txt").write_text("one document\n")
    arguments = ("data", "prepare", "text.txt", "--tokenizer", small_data.tokenizer, "--output", "tokens")
    command = ForkedCommand(number, *arguments, "--workers", 1, module="tests.no_file_locks", cwd=tmp_path)
    assert command.wait(60) == 0, command.errors()
    assert command.errors().count(f"has no file locks ({MISSING[number]}): continuing without them") == 1
    assert {path.name for path in tmp_path.glob("tokens*")} == {"tokens.bin", "tokens.idx", "tokens.json"}


def test_missing_locks_are_logged_once(tmp_path: Path) -> None:
    script = (
        "import sys, tests.no_file_locks as n; n.refuse_locks(38)\n"
        "from sas_megatron.io.file_locks import acquire_file_lock\n"
        "files = [open(sys.argv[1], 'w') for _ in range(3)]\n"
        "print([acquire_file_lock(file.fileno(), shared=i == 1) for i, file in enumerate(files)])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[True, True, True]\n", done.stderr
    assert done.stderr.count("has no file locks (Function not implemented)") == 1


def test_all_locks_are_taken_here() -> None:
    """A lock taken elsewhere would end with an error on a file system without locks."""
    users = {
        path.relative_to(ROOT / "sas_megatron").as_posix()
        for path in (ROOT / "sas_megatron").rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in ("flock", "lockf(", "fcntl"))
    }
    assert users == {Path(file_locks.__file__).relative_to(ROOT / "sas_megatron").as_posix()}
