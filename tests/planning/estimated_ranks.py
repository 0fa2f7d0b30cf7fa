"""Run the same steps on real gloo ranks and on estimated ranks, counted by the same meters."""

from __future__ import annotations

import dataclasses
from typing import Any

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout

# On a busy machine gloo holds messages that it has not sent yet; the least of several peaks excludes them.
NUM_STEPS = 3
PEAKS = ("microbatches_peak_bytes", "update_peak_bytes")


def real_report(config: RunConfig) -> Any:
    """Return the report of a step after the first one, on a real rank."""
    from sas_megatron.planning.memory_meter import MemoryMeter
    from sas_megatron.planning.rank_estimate import StepProfiler

    topology = in_layout(config.parallel)
    num_microbatches = (
        config.training.global_batch_size // config.training.micro_batch_size // topology.data_size
    )
    with MemoryMeter() as memory:
        profiler = StepProfiler(config, topology, memory)
        # The first step does more than later ones: for example, it gathers parameters for the next step.
        profiler.profile_step(num_microbatches)
        reports = [
            profiler.report(num_microbatches=num_microbatches, step=profiler.profile_step(num_microbatches))
            for _ in range(NUM_STEPS)
        ]
    least = {field: min(getattr(report, field) for report in reports) for field in PEAKS}
    return dataclasses.replace(reports[-1], **least)


def estimated_reports(config: RunConfig, ranks: list[int], world_size: int) -> list[Any]:
    """Return the estimated reports of `ranks`. The process must not have joined a process group."""
    from sas_megatron.planning.rank_estimate import estimate_rank

    return [estimate_rank(config, rank=rank, world_size=world_size) for rank in ranks]
