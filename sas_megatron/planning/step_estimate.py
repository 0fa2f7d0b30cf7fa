"""Seconds of an optimizer step, from what its ranks do and what the hardware can. No torch.

An operation takes the longer of computing and moving (roofline: Williams, Waterman, Patterson 2009),
and has to be started. A step of m microbatches on p stages of v chunks takes

    (m + (p-1)/v) · [compute + tensor + context + pipeline of the slowest stage] + data + update

(pipeline bubble: Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Nothing is taken to overlap:
the training code waits for each collective, and reduces gradients after the last microbatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sas_megatron.config.run import RunConfig
from sas_megatron.model.costs import count_training_flops
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.tally import Operation, Tally

if TYPE_CHECKING:
    from sas_megatron.planning.rank_simulation import RankReport


# What a microbatch sends; the other groups speak once a step.
PIPELINED_GROUPS = ("tensor", "context", "pipeline")


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of one optimizer step by term, and what they come to."""

    # compute, bubble, update, and the exposed time of each group of ranks
    terms_seconds: dict[str, float]
    # Idle over busy time of the pipeline: (p-1)/(v·m).
    bubble: float
    tokens: int
    # Share of the devices' peak that the model's FLOPs use (as costs.py counts them, without recompute).
    model_flops_utilization: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.terms_seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds


def estimate_step(
    config: RunConfig, reports: list[RankReport], *, hardware: Hardware, world_size: int
) -> StepEstimate:
    """The step's time from reports of its slowest stages (any, in any order).

    Raises:
        UserError: the hardware file lacks a figure that is needed.
    """
    parallel = config.parallel
    stages, chunks = getattr(parallel, "pipeline", 1), getattr(parallel, "virtual_pipeline", 1)
    slowest = max(reports, key=lambda report: sum(_pipelined_seconds(report, hardware).values()))
    terms = _pipelined_seconds(slowest, hardware)
    bubble = (stages - 1) / chunks / slowest.num_microbatches
    if stages > 1:
        terms["bubble"] = bubble * sum(terms.values())
    terms["update"] = _compute_seconds(slowest.update, hardware)
    for tally in (slowest.microbatches, slowest.update):
        for group, seconds in _wire_seconds(slowest, tally, hardware).items():
            if tally is slowest.update or group not in PIPELINED_GROUPS:
                terms[group] = terms.get(group, 0.0) + seconds
    tokens = config.training.global_batch_size * config.data.sequence_length
    peak = hardware.matrix_rate(config.training.precision) * world_size
    model_flops = tokens * sum(count_training_flops(config).values())
    return StepEstimate(
        terms_seconds={name: seconds for name, seconds in terms.items() if seconds},
        bubble=bubble,
        tokens=tokens,
        model_flops_utilization=model_flops / sum(terms.values()) / peak,
    )


def _pipelined_seconds(report: RankReport, hardware: Hardware) -> dict[str, float]:
    """By term, what all microbatches take of the slowest stage, and a pipeline's ends wait for."""
    wire = _wire_seconds(report, report.microbatches, hardware)
    return {
        "compute": _compute_seconds(report.microbatches, hardware),
        **{group: seconds for group, seconds in wire.items() if group in PIPELINED_GROUPS},
    }


def _compute_seconds(tally: Tally, hardware: Hardware) -> float:
    working = sum(
        calls * working_seconds(operation, hardware) for operation, calls in tally.operations.items()
    )
    starting = 1e-6 * hardware.operation_microseconds * sum(tally.operations.values())
    # A GPU works while the next operations are started; a CPU does one after the other.
    return max(working, starting) if hardware.device == "gpu" else working + starting


def working_seconds(operation: Operation, hardware: Hardware) -> float:
    """The longer of computing and moving."""
    shares = hardware.attainable
    moving = operation.traffic_bytes / (1e9 * hardware.memory_gigabytes_per_second * shares.memory)
    if operation.kind == "elementwise":
        return moving
    share: float = getattr(shares, operation.kind)
    return max(moving, operation.executed_flops / (hardware.matrix_rate(operation.dtype) * share))


def _wire_seconds(report: RankReport, tally: Tally, hardware: Hardware) -> dict[str, float]:
    """By group: bytes over the wire's rate, and in each call a latency for each doubling of the ranks."""
    seconds = {}
    for group in tally.wire_bytes:
        ranks = report.group_ranks.get(group, report.group_ranks["other"])
        wire = hardware.wire_between(ranks)
        rate = 1e9 * wire.gigabytes_per_second * hardware.attainable.wire
        hops = math.ceil(math.log2(max(2, len(ranks))))
        calls = sum(tally.wire_calls.get(group, {}).values())
        seconds[group] = tally.group_bytes(group) / rate + 1e-6 * wire.latency_microseconds * hops * calls
    return seconds
