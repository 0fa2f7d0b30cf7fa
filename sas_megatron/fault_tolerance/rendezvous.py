"""Where all ranks of a run meet: a store that each reaches, or a word on why they do not.

torchrun              its agents have met before, and wait for each other's processes
deepspeed, bare srun  the ranks themselves meet, within JOIN_SECONDS
a process alone       needs no address and no port
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.launcher import check_port_is_free, join_seconds, master_port, wait_for_listener


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """The store that all ranks share, whose answers may take `timeout`; this rank; the world's size.

    Raises:
        FieldError: ranks that no agents brought together did not come.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]  # torch exports it, its stubs do not say so
    if dist.is_torchelastic_launched():
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        return store, rank, world_size
    store, rank, world_size = _meet_by_address()
    store.set_timeout(timeout)
    return store, rank, world_size


def _meet_by_address() -> tuple[Store, int, int]:
    address, port = os.environ["MASTER_ADDR"], master_port()
    seconds = join_seconds()
    if os.environ["RANK"] != "0":
        wait_for_listener(address, port, seconds=seconds)
    else:
        check_port_is_free(port)  # torch would try again and again
    try:
        # Rank 0's returns when all others have connected, who wait for its word that they have.
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        if rank == 0:
            store.set("all are here", "")
        store.wait(["all are here"])
    except dist.DistError as error:
        raise FieldError(
            "WORLD_SIZE",
            os.environ["WORLD_SIZE"],
            f"not all ranks came to {address}:{port} within {seconds:g} s ({str(error).splitlines()[0]})",
            "see what the others say, start all of them, or raise JOIN_SECONDS",
        ) from None
    return store, rank, world_size
