"""Estimate a run: one rank of each kind of pipeline stage, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.rank_estimate import RankReport, estimate_rank
from sas_megatron.planning.step_estimate import StepEstimate, estimate_step
from sas_megatron.planning.step_savings import StepSavings, estimate_savings


@dataclass(frozen=True)
class RunEstimate:
    """Memory, operations and communication of a run's ranks, and the time of a step."""

    world_size: int
    data_parallel: int
    hardware: Hardware
    # One rank of the first, the second and the last stage, if these differ; or the one rank asked for.
    reports: list[RankReport]
    step: StepEstimate
    savings: StepSavings

    @property
    def peak_bytes(self) -> int:
        """Largest peak memory of the tensors of a rank."""
        return max(report.peak_bytes for report in self.reports)


def estimate_run(
    config: RunConfig, *, world_size: int, hardware: Hardware, rank: int | None = None
) -> RunEstimate:
    """Estimate one rank of each kind of pipeline stage, or only `rank`.

    Raises:
        UserError: The layout does not fit the world size, or the hardware file lacks a figure.
    """
    data_parallel = config.check_world_size(world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise FieldError("rank", rank, f"must be one of {world_size} ranks", f"use 0 to {world_size - 1}")
    config = adapt_to_hardware(config, hardware)
    ranks = stage_ranks(config, world_size) if rank is None else [rank]
    reports = [estimate_rank(config, rank=stage_rank, world_size=world_size) for stage_rank in ranks]
    step = estimate_step(config, reports, hardware=hardware, world_size=world_size)
    savings = estimate_savings(
        config, hardware=hardware, step_seconds=step.seconds, data_parallel=data_parallel
    )
    return RunEstimate(world_size, data_parallel, hardware, reports, step, savings)


def stage_ranks(config: RunConfig, world_size: int) -> list[int]:
    """Return the first rank of the first, the second and the last pipeline stage.

    Megatron-core numbers ranks stage by stage. The second stage holds the most activations of the middle
    stages, since it starts the most microbatches ahead.
    """
    stages = config.parallel.pipeline
    per_stage = world_size // stages
    return [stage * per_stage for stage in sorted({0, min(1, stages - 1), stages - 1})]


def adapt_to_hardware(config: RunConfig, hardware: Hardware) -> RunConfig:
    """Return the config with an attention backend and kernel whose operations the estimate can count.

    The estimate runs on tensors of the CPU. On a GPU `auto` is torch's fused attention, which keeps the same
    tensors as the fused attention of the CPU. It applies dropout inside its kernel, whereas the CPU would
    fall back to unfused products, so dropout is set to zero. `cudnn` is estimated in the same way, including
    the padding of the values, which cuDNN does not need.
    """
    attention = config.attention
    if hardware.device == "gpu" and attention.backend != "unfused":
        attention = attention.model_copy(update={"backend": "fused", "dropout": 0.0})
    if isinstance(attention, SimulatedAttentionConfig):
        # Torch does not see the operations of the Triton kernels. The activations of the
        # plain kernels are counted instead.
        attention = attention.model_copy(update={"kernel": "plain"})
    return config.model_copy(update={"attention": attention})
