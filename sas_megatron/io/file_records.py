"""Sizes and checksums of files, recorded when the files are written and compared before they are used.

Files may be damaged or made by hand: only regular files inside of their folder are read, because a device has
no end and a named pipe may never have a writer.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sas_megatron.config.errors import describe_os_error

# Largest size of a record or an index, which is read completely; real ones have some megabytes.
MAX_RECORD_BYTES = 2**28


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file at the time when it was written."""

    size_bytes: int
    sha256: str


def describe_file(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a regular file. The file is read once.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    with open_regular_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def open_regular_file(path: Path) -> io.BufferedReader:
    """Open a file for reading that is neither a device nor a named pipe, nor a link to one.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.open("rb")


def read_regular_file(path: Path, *, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: The file cannot be read, is not a regular file, or has more than `max_bytes`.
    """
    with open_regular_file(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise OSError(errno.EFBIG, f"More than {max_bytes:,} bytes", str(path))
        return file.read(max_bytes)


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def describe_read_error(error: OSError | ValueError) -> str:
    """Return in a few words why a record cannot be read; of pydantic's errors, the first one."""
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the entire file'}: {first['msg']}"
    return str(error)


def find_damage(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Compare files in `folder` with their records; return one line per damaged file.

    Each file is read once. A name or a symbolic link that leads outside of the folder counts as damage.
    """
    return [
        f"{name if name.isprintable() else ascii(name)} {damage}"
        for name, record in files.items()
        if (damage := _find_damage_of_file(folder, name, record)) is not None
    ]


def _find_damage_of_file(folder: Path, name: str, record: FileRecord) -> str | None:
    try:
        path = Path(os.path.realpath(folder / name, strict=True))
        if not path.is_file():
            return "is not a regular file"
        if not path.is_relative_to(os.path.realpath(folder)):
            return "is outside of the folder"
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            return f"has {size_bytes:,} bytes, but {record.size_bytes:,} were written"
        if describe_file(path).sha256 != record.sha256:
            return "has contents that differ from what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({describe_os_error(error)})"
    except ValueError as error:  # a NUL, or characters that no file name has
        return f"is not the name of a file ({error})"
    return None


def select_files_of_rank(
    files: Mapping[str, FileRecord], *, rank: int, num_ranks: int
) -> dict[str, FileRecord]:
    """Return the files that `rank` reads if all ranks together read each file once, in similar amounts."""
    by_size: Sequence[str] = sorted(files, key=lambda name: (-files[name].size_bytes, name))
    return {name: files[name] for name in by_size[rank::num_ranks]}
