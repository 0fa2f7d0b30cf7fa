"""Compare the estimate with a real run on this machine: bytes sent, peak memory and step time."""

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
from sas_megatron.planning.machine_measurement import build_hardware, measure_rank
from sas_megatron.planning.memory_meter import MemoryMeter
from sas_megatron.planning.rank_estimate import StepProfiler, estimate_rank
from sas_megatron.planning.rank_processes import run_on_ranks
from sas_megatron.planning.step_estimate import StepEstimate, estimate_step
from sas_megatron.platform.local_machine import read_memory_bytes

MAX_RANKS = 8
TIMED_STEPS = 5
# On a busy machine gloo holds messages that it has not sent yet; the least of several peaks excludes them.
MEMORY_STEPS = 3

Bytes = dict[str, dict[str, int]]


@dataclass(frozen=True)
class RankComparison:
    """Estimate and measurement of one rank."""

    rank: int
    estimated_bytes_sent: Bytes
    measured_bytes_sent: Bytes
    # Estimated: peak memory of the tensors. Measured: growth of the process's resident memory.
    estimated_peak_bytes: int
    measured_peak_bytes: int

    @property
    def communication_is_equal(self) -> bool:
        """Whether each operation of each group sends exactly the estimated bytes."""
        return self.estimated_bytes_sent == self.measured_bytes_sent

    @property
    def memory_error(self) -> float:
        """Estimated over measured, minus one."""
        return self.estimated_peak_bytes / self.measured_peak_bytes - 1


@dataclass(frozen=True)
class Validation:
    """Estimate of a run, and the measurements of its processes."""

    hardware: Hardware
    ranks: list[RankComparison]
    step: StepEstimate
    measured_step_seconds: float

    @property
    def time_error(self) -> float:
        """Estimated over measured, minus one."""
        return self.step.seconds / self.measured_step_seconds - 1


def validate_estimate(config: RunConfig, *, world_size: int) -> Validation:
    """Run a few steps on synthetic tokens in `world_size` processes of this machine, and estimate each rank.

    Raises:
        UserError: The layout does not fit the world size, or the world size exceeds `MAX_RANKS`.
    """
    config.check_world_size(world_size)
    if world_size > MAX_RANKS:
        raise FieldError(
            "world size",
            world_size,
            f"--validate starts one process per rank on this machine, {MAX_RANKS} at most",
            f"use 1 to {MAX_RANKS}",
        )
    by_rank = run_on_ranks(_measure_rank, config, world_size=world_size)
    hardware = build_hardware([measured["machine"] for measured in by_rank], num_processes=world_size)
    reports = [estimate_rank(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    return Validation(
        hardware=hardware,
        ranks=[
            RankComparison(
                rank=report.rank,
                estimated_bytes_sent=report.step.rounded_bytes_sent(),
                measured_bytes_sent=measured["bytes_sent"],
                estimated_peak_bytes=report.peak_bytes,
                measured_peak_bytes=measured["peak_bytes"],
            )
            for report, measured in zip(reports, by_rank, strict=True)
        ],
        step=estimate_step(config, reports, hardware=hardware, world_size=world_size),
        measured_step_seconds=max(measured["step_seconds"] for measured in by_rank),
    )


def _measure_rank(config: RunConfig) -> dict[str, Any]:
    """Measure this rank of an initialized world: the figures of the machine, then the run."""
    machine = measure_rank()
    # Each tensor gets memory pages of its own, which return to the system when it is freed. The resident
    # memory then follows the live tensors, without the freed memory that the C library keeps.
    _set_mapping_threshold(2**16)
    before, files_before = _resident_bytes("VmRSS"), _resident_bytes("RssFile")
    with joined_groups(config.parallel, device=torch.device("cpu"), seed=config.training.seed) as topology:
        num_microbatches = config.training.num_microbatches(topology.data_size)
        profiler = StepProfiler(config, topology, MemoryMeter())
        profiler.run_step(num_microbatches)
        communication = build_communication_counter(topology)
        with communication:
            profiler.run_step(num_microbatches)
        peaks = []
        for _ in range(MEMORY_STEPS):
            gc.collect()
            _reset_resident_peak()
            profiler.run_step(num_microbatches)
            # Pages of libraries, which are read from their files at their first use, do not count as tensors.
            peaks.append(_resident_bytes("VmHWM") - before - (_resident_bytes("RssFile") - files_before))
        # The steps are timed as in a long run, in which the C library reuses freed pages.
        _set_mapping_threshold(2**25)
        seconds = []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            profiler.run_step(num_microbatches)
            seconds.append(time.perf_counter() - start)
    return {
        "machine": machine,
        "bytes_sent": communication.as_dict(),
        "peak_bytes": min(peaks),
        "step_seconds": statistics.median(seconds),
    }


def _set_mapping_threshold(num_bytes: int) -> None:
    """Set the size from which glibc maps separate pages for a request, and release free memory."""
    library = ctypes.CDLL(None)
    mmap_threshold, trim_threshold = -3, -1  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    library.mallopt(mmap_threshold, num_bytes)
    library.mallopt(trim_threshold, 2 * num_bytes)
    library.malloc_trim(0)


def _resident_bytes(field: str) -> int:
    return read_memory_bytes("/proc/self/status", field)


def _reset_resident_peak() -> None:
    """Reset VmHWM to the resident memory (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
