"""A whole run, simulated: a rank of each kind of pipeline stage, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.rank_estimate import RankReport, estimate_rank
from sas_megatron.planning.step_estimate import StepEstimate, estimate_step


@dataclass(frozen=True)
class RunEstimate:
    """What a run's ranks hold and do, and how long a step takes."""

    world_size: int
    data_parallel: int
    hardware: Hardware
    # Of a first, a middle and the last stage, as far as there are so many; or of the one rank asked for.
    reports: list[RankReport]
    step: StepEstimate

    @property
    def peak_bytes(self) -> int:
        """The most that a rank's tensors hold."""
        return max(report.peak_bytes for report in self.reports)


def estimate_run(
    config: RunConfig, *, world_size: int, hardware: Hardware, rank: int | None = None
) -> RunEstimate:
    """Simulates one rank of each kind of stage, or `rank` alone.

    Raises:
        UserError: layout and world size do not fit, or the hardware file lacks a figure.
    """
    data_parallel = config.check_world_size(world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise FieldError("rank", rank, f"must be one of {world_size} ranks", f"use 0 to {world_size - 1}")
    config = adapt_to_hardware(config, hardware)
    ranks = stage_ranks(config, world_size) if rank is None else [rank]
    reports = [estimate_rank(config, rank=place, world_size=world_size) for place in ranks]
    step = estimate_step(config, reports, hardware=hardware, world_size=world_size)
    return RunEstimate(world_size, data_parallel, hardware, reports, step)


def stage_ranks(config: RunConfig, world_size: int) -> list[int]:
    """The first rank of the first, the second and the last pipeline stage.

    Megatron-core numbers ranks stage by stage. The second stage holds the most activations of those
    between the ends, since it starts the most microbatches ahead.
    """
    stages = config.parallel.pipeline
    per_stage = world_size // stages
    return [stage * per_stage for stage in sorted({0, min(1, stages - 1), stages - 1})]


def adapt_to_hardware(config: RunConfig, hardware: Hardware) -> RunConfig:
    """The config with the attention kernel that the hardware would run, and a simulation that can be counted.

    The simulation's tensors say they are the CPU's. On a GPU `auto` is torch's fused kernel, which keeps
    the same tensors as the fused kernel of the CPU, and draws its dropout inside, where the CPU's
    would fall back to plain products. So does `cudnn`, whose values are counted padded all the same.
    """
    attention = config.attention
    if hardware.device == "gpu" and attention.backend != "unfused":
        attention = attention.model_copy(update={"backend": "fused", "dropout": 0.0})
    if isinstance(attention, SimulatedAttentionConfig):
        # Fused kernels are no operations of torch. (So their activations are counted as the plain form's.)
        attention = attention.model_copy(update={"kernel": "plain"})
    return config.model_copy(update={"attention": attention})
