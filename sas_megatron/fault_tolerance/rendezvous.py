"""The rendezvous: every rank connects to one store, or raises an error that states why it could not.

torchrun                  its agents have connected already and wait for each other's processes
deepspeed, plain srun     the ranks wait for each other, at most JOIN_SECONDS
a single process          needs no address and no port
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.launcher import check_port_is_free, join_seconds, master_port, wait_for_listener


def connect_to_store(timeout: timedelta) -> tuple[Store, int, int]:
    """Connect this rank to the store that all ranks share.

    Args:
        timeout: How long a call to the store may take.

    Returns:
        The store, this rank, and the world size.

    Raises:
        FieldError: Without torchrun, not all ranks have connected within JOIN_SECONDS.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]  # missing from torch's stubs
    if dist.is_torchelastic_launched():
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        return store, rank, world_size
    store, rank, world_size = _connect_by_address()
    store.set_timeout(timeout)
    return store, rank, world_size


def _connect_by_address() -> tuple[Store, int, int]:
    address, port = os.environ["MASTER_ADDR"], master_port()
    seconds = join_seconds()
    if os.environ["RANK"] != "0":
        wait_for_listener(address, port, seconds=seconds)
    else:
        check_port_is_free(port)  # torch would retry until its timeout
    try:
        # On rank 0 this returns once all ranks have connected. The other ranks wait for the key that rank 0
        # then sets.
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        if rank == 0:
            store.set("all ranks connected", "")
        store.wait(["all ranks connected"])
    except dist.DistError as error:
        raise FieldError(
            "WORLD_SIZE",
            os.environ["WORLD_SIZE"],
            f"not all ranks connected to {address}:{port} within {seconds:g} s "
            f"({str(error).splitlines()[0]})",
            "check the logs of the other ranks, start all of them, or raise JOIN_SECONDS",
        ) from None
    return store, rank, world_size
