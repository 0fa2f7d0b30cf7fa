"""Files that are whole or absent: written aside, brought to disk, renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; one that is there is fine, a file in its place is an OSError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # As for a file further up: "File exists" would not tell what is wrong.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it when the block ends well, removed when it does not."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        publish_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """A text file that is replaced whole."""
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def publish_file(aside: Path, path: Path) -> None:
    """Brings a finished file to disk and renames it, so that after a power cut it is whole or absent."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
