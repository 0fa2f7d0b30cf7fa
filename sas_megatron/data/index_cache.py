"""A folder of sample indices that ranks, jobs and nodes share; built once, and either complete or absent.

rank 0 of one job at a time          -> builds it in a temporary folder -> renames it
one rank of each node                -> compares the files with the sizes and checksums in files.json
nodes that do not see rank 0's disk  -> receive rank 0's files and write a copy
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from pydantic import TypeAdapter

from sas_megatron.config.errors import FieldError, translate_os_errors
from sas_megatron.distributed.object_collectives import (
    gather_from_ranks,
    raise_on_all_ranks,
    run_long_on_rank0,
    run_on_rank0,
)
from sas_megatron.distributed.shared_directory import wait_until_visible
from sas_megatron.io.file_locks import acquire_file_lock
from sas_megatron.io.file_records import (
    FileRecord,
    describe_file,
    find_damage,
    read_regular_file,
)
from sas_megatron.io.files import make_folder, sync

logger = logging.getLogger(__name__)

Records = dict[str, FileRecord]
# Sizes and checksums of the other files in the folder.
RECORDS = "files.json"
SCHEMA_VERSION = 1

# A network file system may show a new folder late. After this time the rank's node gets a copy.
SECONDS_UNTIL_VISIBLE = 3.0
BLOCK_BYTES = 2**25
# Age at which the temporary folder of a killed job is removed; a younger one may still be in use.
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class _RecordsFile:
    """The contents of files.json."""

    schema_version: int
    files: Records


_RECORDS_TYPE = TypeAdapter(_RecordsFile)


def provide_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Make `folder` available to every rank with the files that `build` writes; a collective call.

    An existing folder whose files differ from their checksums is removed and built again, which is logged.

    Args:
        folder: Its name must identify its contents.
        build: Called on rank 0 with a new folder, into which it writes the files; it may not communicate.

    Raises:
        FieldError: The folder cannot be written, or is not visible to some rank; the same error on every
            rank.
    """
    records = run_long_on_rank0(lambda: _build_if_needed(folder, build))
    _copy_to_other_nodes(folder, records)


def _build_if_needed(folder: Path, build: Callable[[Path], object]) -> Records:
    """Return the records of the files in `folder`; build it first if it is missing or damaged."""
    records = _find_intact(folder)
    if records is not None:
        return records
    with _writing(folder):
        make_folder(folder.parent)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            records = _find_intact(folder)  # another job may have built it in the meantime
            if records is not None:
                return records
            _remove_damaged(folder)
            _remove_stale_folders(folder)
            with _temporary_folder(folder) as temporary:
                build(temporary)
                records = {path.name: describe_file(path) for path in sorted(temporary.iterdir())}
                contents = _RecordsFile(SCHEMA_VERSION, records)
                (temporary / RECORDS).write_bytes(_RECORDS_TYPE.dump_json(contents, indent=2))
                _publish(temporary, folder)
            return records


def _find_intact(folder: Path) -> Records | None:
    """Return the records of the files in `folder`; None if it is missing or damaged."""
    if not folder.exists():
        return None
    try:
        records = _RECORDS_TYPE.validate_json(read_regular_file(folder / RECORDS), strict=True).files
        names = {path.name for path in folder.iterdir()} - {RECORDS}
        for path in folder.glob("*.npy"):
            # Megatron-core would unpickle an array of objects, which may run code.
            np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return None
    is_complete = len(records) > 0 and names == set(records)
    return records if is_complete and not find_damage(folder, records) else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes that share a file system.

    On a file system without locks two jobs may build the same folder; the one that finishes first wins.
    """
    with path.open("a", encoding="utf-8") as file:
        acquire_file_lock(file.fileno(), wait=True)
        try:
            yield
        finally:
            # A process that waits for this file, or creates a new one, checks for the built folder first.
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, and remove it if it was not renamed, for example on a full disk."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_damaged(folder: Path) -> None:
    """Remove a folder whose files are not as they were written, or what is in its place."""
    if folder.is_dir() and not folder.is_symlink():
        logger.warning(
            "%s: the sample indices are damaged, or have no checksums, and are built again", folder
        )
        # Renamed first, so that another job never sees an incomplete folder.
        renamed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        folder.rename(renamed)
        shutil.rmtree(renamed)
    else:
        folder.unlink(missing_ok=True)


def _remove_stale_folders(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # renamed by another job in the meantime
            if path.is_dir() and time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another job published the same contents first
            raise
    sync(folder.parent)


def _copy_to_other_nodes(folder: Path, records: Records) -> None:
    """Write a copy of rank 0's files on each node that does not see them or has damaged ones."""
    host, rank = socket.gethostname(), dist.get_rank()
    place = _find_place(folder)
    places = gather_from_ranks(place)
    # Ranks that see the same folder verify it once; rank 0 has verified its own.
    is_verifier = place is not None and 0 < rank == places.index(place)
    is_damaged = is_verifier and _find_intact(folder) != records
    lacking = gather_from_ranks(host if place is None or is_damaged else None)
    if not any(lacking):
        return
    is_writer = lacking[rank] is not None and lacking.index(host) == rank
    with contextlib.ExitStack() as stack:
        temporary = raise_on_all_ranks(lambda: _begin_copy(folder, stack, is_damaged) if is_writer else None)
        blocks = _read_blocks(folder)
        while (block := run_on_rank0(lambda: next(blocks, None))) is not None:
            raise_on_all_ranks(functools.partial(_append, temporary, *block))
        raise_on_all_ranks(lambda: _publish_copy(temporary, folder) if temporary is not None else None)
    unshared = [name for name in gather_from_ranks(None if folder.is_dir() else host) if name is not None]
    if unshared:
        raise FieldError(
            "data.index_cache",
            folder.parent,
            f"must be the same folder for all processes of a node, and is not on {unshared[0]}",
            "name a folder that all processes of a node share",
        )


def _find_place(folder: Path) -> tuple[str, int, int] | None:
    """Return what identifies the folder that this rank sees; None if it sees none."""
    if not wait_until_visible(folder, seconds=SECONDS_UNTIL_VISIBLE):
        return None
    status = folder.stat()
    return socket.gethostname(), status.st_dev, status.st_ino


def _begin_copy(folder: Path, stack: contextlib.ExitStack, is_damaged: bool) -> Path:
    with _writing(folder):
        make_folder(folder.parent)
        if is_damaged:
            _remove_damaged(folder)
        return stack.enter_context(_temporary_folder(folder))


def _publish_copy(temporary: Path, folder: Path) -> None:
    with _writing(folder):
        _publish(temporary, folder)


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
