"""A file is hashed while it is written, and its record is that of a file that is read again."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

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


class _WaitingDigest:
    """A digest whose update waits until the file has received data, so hashing first would wait for ever."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def update(self, data: Any) -> None:
        if len(data) > 1000:
            assert _received.wait(timeout=10), "the file is written only after the data were hashed"
        self.num_bytes += len(data)


_received = threading.Event()


def test_hashing_and_writing_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "new_digest", _WaitingDigest)
    started = HashedFile._start_writeback

    def receive(file: HashedFile) -> None:
        started(file)
        _received.set()

    monkeypatch.setattr(HashedFile, "_start_writeback", receive)
    with HashedFile(tmp_path / "file") as file:
        file.write(LARGE)
        digest: Any = file._digest
        assert digest.num_bytes == len(LARGE)


def test_an_error_of_the_disk_is_raised_when_hashing_has_ended(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        with no_file_longer_than(1_000_000), pytest.raises(OSError, match="File too large"):
            file.write(LARGE)
        # The data were not in use any more when the error was raised.
        assert file._digest.hexdigest() == hashlib.sha256(LARGE).hexdigest()
