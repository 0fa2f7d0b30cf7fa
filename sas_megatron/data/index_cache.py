"""A folder of sample indices that ranks, jobs and nodes share; built once, and either complete or absent.

rank 0 of one job at a time          -> builds it in a temporary folder -> renames it
nodes that do not see rank 0's disk  -> receive rank 0's files and write a copy
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from sas_megatron.config.errors import FieldError, translate_os_errors
from sas_megatron.distributed.object_collectives import gather_from_ranks, raise_on_all_ranks, run_on_rank0
from sas_megatron.distributed.shared_directory import wait_until_visible
from sas_megatron.io.files import make_folder, sync

# A network file system may show a new folder late. After this time the rank's node gets a copy.
SECONDS_UNTIL_VISIBLE = 3.0
BLOCK_BYTES = 2**25
# Age at which the temporary folder of a killed job is removed; a younger one may still be in use.
STALE_SECONDS = 24 * 3600


def provide_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Make `folder` available to every rank with the files that `build` writes; a collective call.

    Args:
        folder: Its name must identify its contents.
        build: Called on all ranks with a new folder; rank 0 writes the files into it.

    Raises:
        FieldError: The folder cannot be written, or is not visible to some rank; the same error on every
            rank.
    """
    with contextlib.ExitStack() as lock:
        temporary = run_on_rank0(lambda: _begin(folder, lock))
        if temporary is not None:
            build(temporary)
            run_on_rank0(lambda: _publish(temporary, folder))
    _copy_to_other_nodes(folder)


def _begin(folder: Path, lock: contextlib.ExitStack) -> Path | None:
    """Return a new folder to build in, locked against other jobs until `lock` closes; None if one exists."""
    if folder.is_dir():
        return None
    with _writing(folder):
        make_folder(folder.parent)
        lock.enter_context(_locked(folder.with_name(f".{folder.name}.lock")))
        if folder.is_dir():  # another job built it in the meantime
            return None
        _remove_stale_folders(folder)
        return _make_temporary_folder(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes that share a file system.

    On a file system without locks two jobs may build the same folder; the one that finishes first wins.
    """
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # A process that waits for this file, or creates a new one, checks for the built folder first.
            path.unlink(missing_ok=True)


def _make_temporary_folder(folder: Path) -> Path:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    return temporary


def _remove_stale_folders(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # renamed by another job in the meantime
            if path.is_dir() and time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    with _writing(folder):
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(temporary)  # another job published the same contents first
        sync(folder.parent)


def _copy_to_other_nodes(folder: Path) -> None:
    """Write a copy of rank 0's files on each node that does not see them."""
    host, rank = socket.gethostname(), dist.get_rank()
    lacking = gather_from_ranks(None if wait_until_visible(folder, seconds=SECONDS_UNTIL_VISIBLE) else host)
    if not any(lacking):
        return
    is_writer = lacking[rank] is not None and lacking.index(host) == rank
    temporary = raise_on_all_ranks(lambda: _begin_copy(folder) if is_writer else None)
    blocks = _read_blocks(folder)
    while (block := run_on_rank0(lambda: next(blocks, None))) is not None:
        raise_on_all_ranks(functools.partial(_append, temporary, *block))
    raise_on_all_ranks(lambda: _publish(temporary, folder) if temporary is not None else None)
    unshared = [name for name in gather_from_ranks(None if folder.is_dir() else host) if name is not None]
    if unshared:
        raise FieldError(
            "data.index_cache",
            folder.parent,
            f"must be the same folder for all processes of a node, and is not on {unshared[0]}",
            "name a folder that all processes of a node share",
        )


def _begin_copy(folder: Path) -> Path:
    with _writing(folder):
        make_folder(folder.parent)
        return _make_temporary_folder(folder)


def _read_blocks(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the contents of the files in blocks, each with its file name."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            yield path.name, b""
            while content := file.read(BLOCK_BYTES):
                yield path.name, content


def _append(temporary: Path | None, name: str, content: bytes) -> None:
    if temporary is not None:
        with _writing(temporary), (temporary / name).open("ab") as file:
            file.write(content)


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return translate_os_errors(
        folder.parent,
        problem=f"cannot be written on {socket.gethostname()}",
        remedy="name a writable folder with enough space for the sample indices",
        error_type=functools.partial(FieldError, "data.index_cache"),
    )
