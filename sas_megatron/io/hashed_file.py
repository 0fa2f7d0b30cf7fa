"""Hash a file while it is written, so that it need not be read again for its checksum.

    write(data) ─┬─> thread: SHA-256 of data
                 └─> file, in blocks whose write to disk starts at once ─> sync()

Both run at the same time: hashlib and write release the interpreter's lock. A call waits until its data are
hashed, unless they were lent to the file: lent data are hashed while the caller prepares the next ones.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sas_megatron.io.file_records import FileRecord

# Smaller pieces are copied for the thread.
_SMALL_BYTES = 2**16
# The kernel would otherwise keep the first gigabytes in memory, and write all of them during the final sync.
_BLOCK_BYTES = 2**23
_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2): start to write dirty pages, without waiting for the end
_LIBC = ctypes.CDLL(None)

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
        self._owner: object = None
        self._lent = range(0)
        # The hashing of the last large piece.
        self._hashing: Future[None] | None = None

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

    def lend(self, owner: object, address: int, num_bytes: int) -> None:
        """Promise that some memory stays unchanged until `record`, as long as a reference to `owner` exists.

        Each call replaces the previous promise for pieces that are not yet written.
        """
        self._owner, self._lent = owner, range(address, address + num_bytes)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes and hash them. The caller may then change or free them, unless they are lent.

        At most one lent piece is not yet hashed when the next one is written.

        Raises:
            OSError: The file cannot be written.
        """
        view = memoryview(data).cast("B")
        if view.nbytes < _SMALL_BYTES:
            self._thread.submit(self._digest.update, bytes(view))
            return self._file.write(view)
        if self._hashing is not None:
            self._hashing.result()
        is_lent = np.frombuffer(view, np.uint8).ctypes.data in self._lent
        self._hashing = self._thread.submit(self._hash, view, self._owner if is_lent else None)
        try:
            for begin in range(0, view.nbytes, _BLOCK_BYTES):
                block = view[begin : begin + _BLOCK_BYTES]
                self._file.write(block)
                self._start_writeback(block.nbytes)
        finally:
            if not is_lent:
                self._hashing.result()
        return view.nbytes

    def _hash(self, view: memoryview, _owner: object) -> None:
        """Hash a piece in the thread, which holds a reference to the owner of its memory meanwhile."""
        self._digest.update(view)

    def _start_writeback(self, num_bytes: int) -> None:
        """Let the kernel write the last bytes to disk, without waiting for it."""
        self._file.flush()
        # Linux only, and a mere hint: the final sync reports errors.
        if (start := getattr(_LIBC, "sync_file_range", None)) is not None:
            offset = ctypes.c_int64(self._file.tell() - num_bytes)
            start(self._file.fileno(), offset, ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)

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
        """Wait until everything is hashed, and return the size and checksum of what has been written."""
        checksum = self._thread.submit(self._digest.hexdigest).result()
        return FileRecord(self._file.tell(), checksum)
