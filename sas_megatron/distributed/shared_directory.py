"""Whether all ranks see the directory that the run writes to: checkpoints lie there, a part a rank."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from sas_megatron.config.errors import FieldError
from sas_megatron.distributed.gathering import gather_from_ranks

# A network file system may show a new file late to those that looked before it was there.
SECONDS_UNTIL_SEEN = 10.0


def check_directory_is_shared(directory: Path) -> None:
    """Rank 0 leaves a file there, and all look for it. Collective, in a joined world.

    Raises:
        FieldError: on all ranks alike, if one or more do not find it.
    """
    rank = dist.get_rank()
    if dist.get_world_size() == 1:
        return
    name = [f".seen-by-all-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    mark = directory / name[0]
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    blind = gather_from_ranks(None if appears(mark) else socket.gethostname())
    if rank == 0:
        mark.unlink()
    hosts = [f"rank {number} on {host}" for number, host in enumerate(blind) if host is not None]
    if hosts:
        more = f" and {len(hosts) - 1} more" if hosts[1:] else ""
        error = FieldError(
            "logging.run_directory",
            directory,
            f"is another folder to {hosts[0]}{more} than to rank 0",
            "put it on a file system that all nodes share",
        )
        error.raised_on_all_ranks = True
        raise error


def appears(path: Path, *, seconds: float = SECONDS_UNTIL_SEEN) -> bool:
    """Whether a path that another rank has made is there, or comes within so long."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes a network file system look again
    return True
