"""Hash a file while it is written, so that it need not be read again for its checksum.

    write(data) ─┬─> thread: SHA-256 of data
                 └─> file, in blocks whose write to disk starts at once ─> sync()

Both branches of a call run at the same time: hashlib and write release the interpreter's lock. A call returns
when both have finished, so nothing is held beyond the caller's own data.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from sas_megatron.io.file_records import FileRecord

# Smaller pieces are hashed in the calling thread, since handing one over costs about 20 µs.
_SMALL_BYTES = 2**16
# The kernel would otherwise keep the first gigabytes in memory, and write all of them during the final sync.
_BLOCK_BYTES = 2**23

# `bench checkpoint` replaces it, to save without checksums.
new_digest = hashlib.sha256


class HashedFile:
    """A new binary file, for `torch.save` and the like, with its SHA-256."""

    def __init__(self, path: Path) -> None:
        """Create the file, or truncate an existing one.

        Raises:
            OSError: The file cannot be opened.
        """
        self._file = path.open("wb")
        self._digest = new_digest()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes and hash them. The caller may change or free them afterwards.

        Raises:
            OSError: The file cannot be written.
        """
        view = memoryview(data).cast("B")
        if view.nbytes < _SMALL_BYTES:
            self._digest.update(view)
            return self._file.write(view)
        hashing = self._thread.submit(self._digest.update, view)
        try:
            for begin in range(0, view.nbytes, _BLOCK_BYTES):
                self._file.write(view[begin : begin + _BLOCK_BYTES])
                self._start_writeback()
        finally:
            hashing.result()
        return view.nbytes

    def _start_writeback(self) -> None:
        """Let the kernel write to disk what it has received, without waiting for it.

        On Linux, `POSIX_FADV_DONTNEED` does so before it drops the pages that are already on disk.
        """
        self._file.flush()
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Pass buffered bytes to the kernel.

        Raises:
            OSError: The file cannot be written.
        """
        self._file.flush()

    def sync(self) -> None:
        """Wait until the contents are on disk.

        Raises:
            OSError: The file cannot be written.
        """
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self) -> FileRecord:
        """Return the size and checksum of what has been written."""
        return FileRecord(self._file.tell(), self._digest.hexdigest())
