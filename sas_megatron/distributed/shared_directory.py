"""A check that all ranks see the same run directory, to which each writes its checkpoint shards."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from sas_megatron.config.errors import FieldError
from sas_megatron.distributed.object_collectives import gather_from_ranks

# A network file system may show a new file late to hosts that have looked for it before it existed.
SECONDS_UNTIL_VISIBLE = 10.0


def check_directory_is_shared(directory: Path) -> None:
    """Check that a file which rank 0 creates in `directory` is visible to all ranks; every rank must call it.

    Raises:
        FieldError: One or more ranks do not see the file. All ranks raise it.
    """
    rank = dist.get_rank()
    if dist.get_world_size() == 1:
        return
    name = [f".seen-by-all-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    marker = directory / name[0]
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    dist.barrier()
    hosts_without_file = gather_from_ranks(None if wait_until_visible(marker) else socket.gethostname())
    if rank == 0:
        marker.unlink()
    missing = [
        f"rank {number} on {host}" for number, host in enumerate(hosts_without_file) if host is not None
    ]
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        error = FieldError(
            "logging.run_directory",
            directory,
            f"is a different directory for {missing[0]}{others} than for rank 0",
            "use a directory on a file system that all nodes share",
        )
        error.raised_on_all_ranks = True
        raise error


def wait_until_visible(path: Path, *, seconds: float = SECONDS_UNTIL_VISIBLE) -> bool:
    """Return whether a path that another rank has created becomes visible here within `seconds`."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes a network file system refresh its view
    return True
