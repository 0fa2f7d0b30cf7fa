"""The estimate against a real run on this machine: bytes on the wire, memory and time, with the errors."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.topology import build_communication_counter, joined_groups
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.machine_measurement import hardware_from, measure_here
from sas_megatron.planning.memory_meter import MemoryMeter
from sas_megatron.planning.rank_processes import run_on_ranks
from sas_megatron.planning.rank_simulation import Stepper, simulate_rank
from sas_megatron.planning.step_estimate import StepEstimate, estimate_step
from sas_megatron.platform.local_machine import read_memory_bytes

MOST_RANKS = 8
TIMED_STEPS = 5
# Beside other load gloo holds what it has not sent yet; the least of several peaks is without that.
WEIGHED_STEPS = 3

Bytes = dict[str, dict[str, int]]


@dataclass(frozen=True)
class RankComparison:
    """One rank, estimated and measured."""

    rank: int
    estimated_wire_bytes: Bytes
    measured_wire_bytes: Bytes
    # The most that tensors hold, and the growth of the process's resident memory.
    estimated_peak_bytes: int
    measured_peak_bytes: int

    @property
    def wire_is_equal(self) -> bool:
        """Whether each operation of each group sends what was estimated, to the byte."""
        return self.estimated_wire_bytes == self.measured_wire_bytes

    @property
    def memory_error(self) -> float:
        """Estimated over measured, less one."""
        return self.estimated_peak_bytes / self.measured_peak_bytes - 1


@dataclass(frozen=True)
class Validation:
    """A run's estimate and what its processes showed."""

    hardware: Hardware
    ranks: list[RankComparison]
    step: StepEstimate
    measured_step_seconds: float

    @property
    def time_error(self) -> float:
        """Estimated over measured, less one."""
        return self.step.seconds / self.measured_step_seconds - 1


def validate_estimate(config: RunConfig, *, world_size: int) -> Validation:
    """Runs `world_size` processes of this machine for a few steps on made-up tokens, and simulates each.

    Raises:
        UserError: the layout does not fit, or asks for more processes than this is meant for.
    """
    config.check_world_size(world_size)
    if world_size > MOST_RANKS:
        raise FieldError(
            "world size",
            world_size,
            f"--validate starts that many processes here, {MOST_RANKS} at most",
            "give fewer ranks",
        )
    by_rank = run_on_ranks(_measure_rank, config, world_size=world_size)
    hardware = hardware_from([measured["machine"] for measured in by_rank], num_processes=world_size)
    reports = [simulate_rank(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    return Validation(
        hardware=hardware,
        ranks=[
            RankComparison(
                rank=report.rank,
                estimated_wire_bytes=report.step.rounded_wire_bytes(),
                measured_wire_bytes=measured["wire_bytes"],
                estimated_peak_bytes=report.peak_bytes,
                measured_peak_bytes=measured["peak_bytes"],
            )
            for report, measured in zip(reports, by_rank, strict=True)
        ],
        step=estimate_step(config, reports, hardware=hardware, world_size=world_size),
        measured_step_seconds=max(measured["step_seconds"] for measured in by_rank),
    )


def _measure_rank(config: RunConfig) -> dict[str, Any]:
    """On a rank of a joined world: the machine's figures, then the run's."""
    machine = measure_here()
    # Each tensor in pages of its own, which return to the system when it is freed: what is resident is
    # then what is held, and not what the C library keeps for the next.
    _set_mapping_threshold(2**16)
    before, files_before = _resident_bytes("VmRSS"), _resident_bytes("RssFile")
    with joined_groups(config.parallel, device=torch.device("cpu"), seed=config.training.seed) as topology:
        num_microbatches = config.training.num_microbatches(topology.data_size)
        stepper = Stepper(config, topology, MemoryMeter())
        stepper.run(num_microbatches)
        ledger = build_communication_counter(topology)
        with ledger:
            stepper.run(num_microbatches)
        peaks = []
        for _ in range(WEIGHED_STEPS):
            gc.collect()
            _forget_peak()
            stepper.run(num_microbatches)
            # Pages of libraries, read from their files when first used, are no tensors.
            peaks.append(_resident_bytes("VmHWM") - before - (_resident_bytes("RssFile") - files_before))
        # As the C library would have it after some steps: pages are kept, and not asked for anew.
        _set_mapping_threshold(2**25)
        seconds = []
        for _ in range(TIMED_STEPS):
            begun = time.perf_counter()
            stepper.run(num_microbatches)
            seconds.append(time.perf_counter() - begun)
    return {
        "machine": machine,
        "wire_bytes": ledger.as_dict(),
        "peak_bytes": min(peaks),
        "step_seconds": statistics.median(seconds),
    }


def _set_mapping_threshold(num_bytes: int) -> None:
    """From which size glibc maps memory of its own for each request; it also returns what is free now."""
    library = ctypes.CDLL(None)
    mmap_threshold, trim_threshold = -3, -1  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    library.mallopt(mmap_threshold, num_bytes)
    library.mallopt(trim_threshold, 2 * num_bytes)
    library.malloc_trim(0)


def _resident_bytes(field: str) -> int:
    return read_memory_bytes("/proc/self/status", field)


def _forget_peak() -> None:
    """Lets VmHWM start anew from what is resident (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
