"""The same steps on real gloo ranks and on simulated ones, counted by the same meters."""

from __future__ import annotations

from typing import Any

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout


def real_report(config: RunConfig) -> Any:
    """On a rank: what a step does and holds, the step after the first."""
    from sas_megatron.planning.memory_meter import MemoryMeter
    from sas_megatron.planning.rank_simulation import Stepper

    topology = in_layout(config.parallel)
    num_microbatches = (
        config.training.global_batch_size // config.training.micro_batch_size // topology.data_size
    )
    with MemoryMeter() as memory:
        stepper = Stepper(config, topology, memory)
        # The first step's own, such as parameters that are gathered for the next.
        stepper.step(num_microbatches)
        return stepper.report(num_microbatches=num_microbatches, step=stepper.step(num_microbatches))


def simulated_reports(config: RunConfig, ranks: list[int], world_size: int) -> list[Any]:
    """In a process that is in no group: the reports of `ranks`."""
    from sas_megatron.planning.rank_simulation import simulate_rank

    return [simulate_rank(config, rank=rank, world_size=world_size) for rank in ranks]
