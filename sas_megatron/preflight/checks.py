"""All preflight checks: of this node first, then of all ranks if they can connect."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.platform.launcher import is_rank0, join_seconds, launched_world_size, wait_for_listener
from sas_megatron.preflight.finding import Finding, failure, fine
from sas_megatron.preflight.infiniband import check_infiniband
from sas_megatron.preflight.network import check_host_name, check_interfaces, check_rendezvous
from sas_megatron.preflight.node import (
    check_environment,
    check_gpus,
    check_open_files,
    check_run_directory,
    check_shared_memory,
)

# float32 weights and the two moments of AdamW, and half-precision weights.
CHECKPOINT_BYTES_PER_PARAMETER = 14


@dataclass(frozen=True)
class PreflightReport:
    """All findings that this rank has.

    Attributes:
        findings: The findings of this node, or of the entire allocation if the ranks can connect.
        num_ranks: The world size.
        is_printed: Whether this rank prints the report.
    """

    findings: Sequence[Finding]
    num_ranks: int
    is_printed: bool


def run_preflight_checks(run_directory: Path, config: RunConfig | None) -> PreflightReport:
    """Check this node, and the allocation if a launcher has started more than one rank.

    In an allocation all ranks must call it.

    Args:
        run_directory: The directory that the run would write to.
        config: Also check that this config is valid here.
    """
    world_size = launched_world_size()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        host = socket.gethostname()
        node = [replace(found, place=host) for found in _check_node(run_directory, config, world_size)]
    else:
        node = []
    if world_size == 1:
        return PreflightReport(node, 1, is_printed=True)

    from sas_megatron.distributed.object_collectives import gather_from_ranks
    from sas_megatron.preflight import allocation

    try:
        # torch's own wait for rank 0 may be twice as long, and its message has fewer details.
        if not is_rank0():
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait_for_listener(address, port, seconds=join_seconds())
        device = allocation.find_device()
        with allocation.joined_world(device):
            all_ranks = list(allocation.check_allocation(device, run_directory))
            nodes = [found for findings in gather_from_ranks(node) for found in findings]
    except Exception as error:  # torch, gloo and NCCL raise many types
        lines = str(error).splitlines() or [""]
        unconnected = failure(
            "allocation",
            f"rank {os.environ['RANK']} on {socket.gethostname()} cannot connect to the other ranks "
            f"({type(error).__name__}: {lines[0][:200]})",
            "fix the failures of this node; if there are none, check the other nodes and firewalls",
        )
        return PreflightReport([*node, unconnected], world_size, is_printed=True)
    return PreflightReport([*nodes, *all_ranks], world_size, is_printed=is_rank0())


def compare_layout(config: RunConfig, *, show: Callable[[PreflightReport], None]) -> PreflightReport:
    """Compare a small version of a run in one process with the same at its layout (`layout_check`).

    All ranks that a launcher has started must call it.

    Args:
        config: The run.
        show: Prints the report; called on rank 0.

    Raises:
        UserError: The config is not valid for this number of ranks or these devices.
    """
    world_size = launched_world_size()
    config.check_world_size(world_size)
    from sas_megatron.platform.device import prepare_device
    from sas_megatron.platform.gpu_settings import apply_gpu_settings

    apply_gpu_settings(config.training)
    device = prepare_device()  # before Megatron-core is imported

    from sas_megatron.preflight.layout_check import check_layout

    def report(findings: list[Finding]) -> None:
        show(PreflightReport(findings, world_size, is_printed=True))

    findings = check_layout(config, device=device, world_size=world_size, report=report)
    return PreflightReport(findings, world_size, is_printed=False)


def _check_node(run_directory: Path, config: RunConfig | None, world_size: int) -> Iterator[Finding]:
    # This precedes the import of torch, which opens many files and takes seconds.
    yield check_open_files(world_size=world_size)
    yield from check_rendezvous(os.environ)
    yield check_host_name(os.environ)
    yield from check_interfaces(os.environ)
    yield from check_run_directory(run_directory, checkpoint_bytes=_checkpoint_bytes(config))
    if config is not None:
        yield from _check_config(config, world_size)

    import torch

    from sas_megatron.preflight.software import check_software

    uses_gpus = torch.cuda.is_available()
    engine = config.training.engine if config is not None else None
    yield check_shared_memory(uses_gpus=uses_gpus)
    yield from check_environment(os.environ, engine=engine, uses_gpus=uses_gpus)
    if uses_gpus:  # gloo uses the devices only as network interfaces
        yield from check_infiniband(os.environ)
    yield from check_software()
    yield from check_gpus()


def _checkpoint_bytes(config: RunConfig | None) -> int | None:
    if config is None:
        return None
    return CHECKPOINT_BYTES_PER_PARAMETER * sum(count_parameters(config).values())


def _check_config(config: RunConfig, world_size: int) -> Iterator[Finding]:
    from sas_megatron.training import entry

    # A single process does not know the world size of the planned run, so the smallest one is assumed.
    size = world_size if world_size > 1 else config.parallel.model_size
    try:
        entry.check_run(config, world_size=size)
    except UserError as error:
        yield failure("config", str(error), "change the config as the message states")
    else:
        yield fine("config", f"valid on {size} ranks, and its data exists")
