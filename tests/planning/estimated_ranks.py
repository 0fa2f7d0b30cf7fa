"""The same steps on real gloo ranks and on simulated ones, counted by the same meters."""

from __future__ import annotations

import dataclasses
from typing import Any

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout

# Beside other load gloo holds what it has not sent yet; the least of several peaks is without that.
STEPS = 3
PEAKS = ("microbatches_peak_bytes", "update_peak_bytes")


def real_report(config: RunConfig) -> Any:
    """On a rank: what a step does and holds, after the first step."""
    from sas_megatron.planning.memory_meter import MemoryMeter
    from sas_megatron.planning.rank_estimate import StepProfiler

    topology = in_layout(config.parallel)
    num_microbatches = (
        config.training.global_batch_size // config.training.micro_batch_size // topology.data_size
    )
    with MemoryMeter() as memory:
        stepper = StepProfiler(config, topology, memory)
        # The first step's own, such as parameters that are gathered for the next.
        stepper.step(num_microbatches)
        reports = [
            stepper.report(num_microbatches=num_microbatches, step=stepper.step(num_microbatches))
            for _ in range(STEPS)
        ]
    least = {field: min(getattr(report, field) for report in reports) for field in PEAKS}
    return dataclasses.replace(reports[-1], **least)


def simulated_reports(config: RunConfig, ranks: list[int], world_size: int) -> list[Any]:
    """In a process that is in no group: the reports of `ranks`."""
    from sas_megatron.planning.rank_estimate import estimate_rank

    return [estimate_rank(config, rank=rank, world_size=world_size) for rank in ranks]
