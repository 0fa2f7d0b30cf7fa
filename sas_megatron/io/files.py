"""Atomic file writes: after a crash or a power failure a file has its old or its complete new contents.

    temporary file in the same folder -> fsync -> rename -> fsync of the folder

`save_file` raises a user error. The other functions raise OSError; callers wrap them in
`config.errors.translate_os_errors`, which adds the remedy.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sas_megatron.config.errors import FieldError, translate_os_errors


def user_cache_folder() -> Path:
    """Return `sas_megatron` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).

    Raises:
        FieldError: XDG_CACHE_HOME is not set, and the user has no home folder.
    """
    configured = os.environ.get("XDG_CACHE_HOME")
    if configured:
        return Path(configured) / "sas_megatron"
    try:
        return Path.home() / ".cache" / "sas_megatron"
    except RuntimeError:  # HOME is not set, and the user id has no entry in the password database
        raise FieldError(
            "XDG_CACHE_HOME",
            "",
            "must name the cache folder of a user without a home folder",
            "set it to a writable folder",
        ) from None


def format_path(path: Path) -> str:
    """Return a path as text for a file in UTF-8; bytes of its name that are not UTF-8 become `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def make_folder(path: Path) -> None:
    """Create a folder and its parents; an existing folder is left as it is.

    Raises:
        NotADirectoryError: `path` or one of its parents is a file.
        OSError: The folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # mkdir raises this error if a parent is a file. Raise it also if `path` itself is a file, because
        # "File exists" does not name the fault.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which becomes `path` when the block ends without an error.

    After an error the temporary file is removed and `path` keeps its previous contents.

    Raises:
        OSError: The file cannot be synced or renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_file(path: Path, content: str | bytes, *, remedy: str) -> None:
    """Create the parent folders and write a file atomically, text as UTF-8.

    Args:
        path: The file.
        content: Its new contents.
        remedy: The remedy in the error message, such as "name another --output".

    Raises:
        FileProblem: The file or a folder cannot be written.
    """
    with translate_os_errors(path, problem="cannot be written", remedy=remedy):
        make_folder(path.parent)
        write_file(path, content)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8.

    Raises:
        OSError: The file cannot be written.
    """
    with replace_file(path) as temporary:
        temporary.write_bytes(_encode(content))


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, and rename them only when all of them are complete on disk.

    Raises:
        OSError: A file cannot be written; after a failed write every file keeps its previous contents.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(replace_file(path))
            temporary.write_bytes(_encode(content))
            sync(temporary)  # a full disk may be reported only here, before the first rename


def _encode(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on disk.

    Raises:
        OSError: The path cannot be opened or synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
