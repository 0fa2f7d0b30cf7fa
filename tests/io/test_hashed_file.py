"""A file is hashed while it is written, and its record is that of a file that is read again."""

from __future__ import annotations

import gc
import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sas_megatron.io import hashed_file
from sas_megatron.io.file_records import describe_file
from sas_megatron.io.hashed_file import HashedFile
from tests.full_disk import no_file_longer_than

LARGE = os.urandom(20_000_001)


def test_the_record_is_that_of_the_file(tmp_path: Path) -> None:
    pieces = [b"", b"head", LARGE, LARGE[:65_536], LARGE[:65_535], memoryview(LARGE)[3:100_000], b"tail"]
    with HashedFile(tmp_path / "file") as file:
        for piece in pieces:
            begin = file.tell()
            assert file.write(piece) == len(piece)
            assert file.tell() == begin + len(piece)
        file.sync()
        record = file.record()
    content = b"".join(map(bytes, pieces))
    assert (tmp_path / "file").read_bytes() == content
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert record == describe_file(tmp_path / "file")


def test_data_may_change_after_it_was_written(tmp_path: Path) -> None:
    data = bytearray(LARGE)
    with HashedFile(tmp_path / "file") as file:
        file.write(memoryview(data))
        data[:] = bytes(len(data))
        assert file.record().sha256 == hashlib.sha256(LARGE).hexdigest()


class WaitingDigest:
    """A digest whose update of large data waits for an event."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.allowed = threading.Event()

    def update(self, data: Any) -> None:
        if len(data) > 1000:
            assert self.allowed.wait(timeout=10), "the event that the test waits for comes after hashing"
        self.num_bytes += len(data)

    def hexdigest(self) -> str:
        return str(self.num_bytes)


def test_hashing_and_writing_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing waits for the first block in the file, so it would wait for ever if it came first."""
    monkeypatch.setattr(hashed_file, "new_digest", WaitingDigest)
    started = HashedFile._start_writeback

    def receive(file: HashedFile, num_bytes: int) -> None:
        started(file, num_bytes)
        file._digest.allowed.set()  # type: ignore[attr-defined]

    monkeypatch.setattr(HashedFile, "_start_writeback", receive)
    with HashedFile(tmp_path / "file") as file:
        file.write(LARGE)
        assert file._digest.num_bytes == len(LARGE)  # type: ignore[attr-defined]


class Owner:
    """An object that owns memory, such as a tensor."""

    def __init__(self, size: int) -> None:
        self.memory = np.zeros(size, np.uint8)


def test_a_call_does_not_wait_for_lent_data_and_keeps_their_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed_file, "new_digest", WaitingDigest)
    with HashedFile(tmp_path / "file") as file:
        owner: Owner | None = Owner(1_000_000)
        assert owner is not None
        freed = weakref.ref(owner)
        file.lend(owner, owner.memory.ctypes.data, owner.memory.nbytes)
        file.write(memoryview(owner.memory))
        owner = None
        file.lend(None, 0, 0)
        gc.collect()
        assert freed() is not None
        file._digest.allowed.set()  # type: ignore[attr-defined]
        assert file.record().sha256 == "1000000"
        gc.collect()
        assert freed() is None


def test_data_beside_lent_memory_are_hashed_before_the_call_returns(tmp_path: Path) -> None:
    data, lent = bytearray(LARGE), Owner(1_000_000)
    with HashedFile(tmp_path / "file") as file:
        file.lend(lent, lent.memory.ctypes.data, lent.memory.nbytes)
        file.write(memoryview(lent.memory))
        file.write(memoryview(data))
        data[:] = bytes(len(data))
        file.write(b"end")
        assert file.record().sha256 == hashlib.sha256(bytes(1_000_000) + LARGE + b"end").hexdigest()


def test_an_error_of_the_disk_is_raised_when_hashing_has_ended(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        with no_file_longer_than(1_000_000), pytest.raises(OSError, match="File too large"):
            file.write(LARGE)
        # The data were not in use any more when the error was raised.
        assert file.record().sha256 == hashlib.sha256(LARGE).hexdigest()
