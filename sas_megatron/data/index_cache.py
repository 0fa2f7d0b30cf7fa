"""A folder of sample indices that ranks, jobs and nodes share: built once, whole or not there at all.

rank 0, of one job at a time -> builds it aside -> renames it
nodes that do not see it     -> get rank 0's files, into a folder of their own
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

# A network file system may show a folder late: then the rank gets what it would have found.
SECONDS_UNTIL_SEEN = 3.0
PIECE_BYTES = 2**25
# What a builder that was killed has left lies for so long: another may be at work on its own.
LEFT_OVER_SECONDS = 24 * 3600


def provide_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Sees to it that `folder` is there for every rank, with what `build` writes; all must call it.

    Args:
        folder: Its name stands for all that decides its contents.
        build: Writes them, on rank 0, into the new folder that it is given; all ranks call it.

    Raises:
        FieldError: it cannot be written, or some rank does not see it; the same on every rank.
    """
    with contextlib.ExitStack() as turn:
        aside = run_on_rank0(lambda: _begin(folder, turn))
        if aside is not None:
            build(aside)
            run_on_rank0(lambda: _publish(aside, folder))
    _hand_out(folder)


def _begin(folder: Path, turn: contextlib.ExitStack) -> Path | None:
    """A new folder to build in, with nobody else building until `turn` ends; None if there is no need."""
    if folder.is_dir():
        return None
    with _written(folder):
        make_folder(folder.parent)
        turn.enter_context(_locked(folder.with_name(f".{folder.name}.lock")))
        if folder.is_dir():  # another job built it meanwhile
            return None
        _remove_left_over(folder)
        return _new_aside(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock between processes that see one file system.

    Where it knows no locks, two jobs may build the same at the same time, and one of them in vain.
    """
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Whoever has waited at it, or makes it anew, looks first for what was built.
            path.unlink(missing_ok=True)


def _new_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    return aside


def _remove_left_over(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # it was published just now
            if path.is_dir() and time.time() - path.stat().st_mtime > LEFT_OVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _publish(aside: Path, folder: Path) -> None:
    with _written(folder):
        for path in (*aside.iterdir(), aside):
            sync(path)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(aside)  # another was faster, with the same
        sync(folder.parent)


def _hand_out(folder: Path) -> None:
    """Gives rank 0's files to the nodes that have none."""
    host, rank = socket.gethostname(), dist.get_rank()
    blind = gather_from_ranks(None if wait_until_visible(folder, seconds=SECONDS_UNTIL_SEEN) else host)
    if not any(blind):
        return
    is_writer = blind[rank] is not None and blind.index(host) == rank
    aside = raise_on_all_ranks(lambda: _begin_copy(folder) if is_writer else None)
    pieces = _pieces(folder)
    while (piece := run_on_rank0(lambda: next(pieces, None))) is not None:
        raise_on_all_ranks(functools.partial(_append, aside, *piece))
    raise_on_all_ranks(lambda: _publish(aside, folder) if aside is not None else None)
    unseen = [place for place in gather_from_ranks(None if folder.is_dir() else host) if place is not None]
    if unseen:
        raise FieldError(
            "data.index_cache",
            folder.parent,
            f"is another folder to one process on {unseen[0]} than to the next",
            "name one that all processes of a node share",
        )


def _begin_copy(folder: Path) -> Path:
    with _written(folder):
        make_folder(folder.parent)
        return _new_aside(folder)


def _pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What the files hold, each with its file's name."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            yield path.name, b""
            while content := file.read(PIECE_BYTES):
                yield path.name, content


def _append(aside: Path | None, name: str, content: bytes) -> None:
    if aside is not None:
        with _written(aside), (aside / name).open("ab") as file:
            file.write(content)


def _written(folder: Path) -> contextlib.AbstractContextManager[None]:
    return translate_os_errors(
        folder.parent,
        problem=f"cannot be written on {socket.gethostname()}",
        remedy="name a writable folder with enough space for the sample indices",
        error_type=functools.partial(FieldError, "data.index_cache"),
    )
