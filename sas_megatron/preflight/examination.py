"""The order of the checks: what can be told of this node first, then, if ranks meet, of all of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.platform.launcher import is_first_rank, join_seconds, launched_world_size, wait_for_listener
from sas_megatron.preflight.finding import Finding, failure, fine
from sas_megatron.preflight.network import check_interfaces, check_meeting, check_own_name
from sas_megatron.preflight.node import (
    check_environment,
    check_open_files,
    check_run_directory,
    check_shared_memory,
)

# Weights and AdamW's two moments in float32, and half-precision weights beside them.
CHECKPOINT_BYTES_PER_PARAMETER = 14


@dataclass(frozen=True)
class Examination:
    """All findings, on the rank that speaks; `speaks` is false on the others."""

    findings: Sequence[Finding]
    num_ranks: int
    speaks: bool


def examine(run_directory: Path, config: RunConfig | None) -> Examination:
    """Checks this node, or under a launcher the allocation: collective there."""
    world_size = launched_world_size()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        host = socket.gethostname()
        own = [replace(found, place=host) for found in _check_node(run_directory, config, world_size)]
    else:
        own = []
    if world_size == 1:
        return Examination(own, 1, speaks=True)

    from sas_megatron.distributed.gathering import gather_from_ranks
    from sas_megatron.preflight import allocation

    try:
        # torch's own wait for rank 0 may be twice as long, and says less.
        if not is_first_rank():
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait_for_listener(address, port, seconds=join_seconds())
        device = allocation.find_device()
        with allocation.joined_world(device):
            together = list(allocation.check_allocation(device, run_directory))
            nodes = [found for findings in gather_from_ranks(own) for found in findings]
    except Exception as error:  # of torch, gloo or NCCL, by many names
        lines = str(error).splitlines() or [""]
        unmet = failure(
            "allocation",
            f"rank {os.environ['RANK']} on {socket.gethostname()} and the others do not get together "
            f"({type(error).__name__}: {lines[0][:200]})",
            "mend what is found on this node; else look at the other nodes, and at a firewall between them",
        )
        return Examination([*own, unmet], world_size, speaks=True)
    return Examination([*nodes, *together], world_size, speaks=is_first_rank())


def _check_node(run_directory: Path, config: RunConfig | None, world_size: int) -> Iterator[Finding]:
    # Before torch is imported, which takes many files and seconds.
    yield check_open_files(world_size=world_size)
    yield from check_meeting(os.environ)
    yield check_own_name(os.environ)
    yield from check_interfaces(os.environ)
    yield from check_run_directory(run_directory, checkpoint_bytes=_checkpoint_bytes(config))
    if config is not None:
        yield from _check_config(config, world_size)

    import torch

    from sas_megatron.preflight.gpus import check_gpus
    from sas_megatron.preflight.software import check_software

    uses_gpus = torch.cuda.is_available()
    yield check_shared_memory(uses_gpus=uses_gpus)
    yield from check_environment(os.environ, uses_gpus=uses_gpus)
    yield from check_software()
    yield from check_gpus()


def _checkpoint_bytes(config: RunConfig | None) -> int | None:
    if config is None:
        return None
    return CHECKPOINT_BYTES_PER_PARAMETER * sum(count_parameters(config).values())


def _check_config(config: RunConfig, world_size: int) -> Iterator[Finding]:
    from sas_megatron.training import start

    # A process alone says nothing of the size of the run that is to be.
    size = world_size if world_size > 1 else config.parallel.model_size
    try:
        start.check(config, world_size=size)
    except UserError as error:
        yield failure("config", str(error), "mend it as the message says")
    else:
        yield fine("config", f"legal on {size} ranks, and its data is there")
