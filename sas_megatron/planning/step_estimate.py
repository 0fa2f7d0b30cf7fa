"""Seconds of an optimizer step, from what its ranks do and what the hardware can. No torch.

An operation takes the longer of computing and moving (roofline: Williams, Waterman, Patterson 2009),
and has to be started. A step of m microbatches on p stages of v chunks takes

    (m + (p-1)/v) · [compute + tensor + context + pipeline of the slowest stage] + data + update

(pipeline bubble: Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Nothing is taken to overlap but
what `parallel.overlap_*` asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
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
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    slowest = max(reports, key=lambda report: sum(_pipelined_seconds(report, hardware).values()))
    terms = _pipelined_seconds(slowest, hardware)
    bubble = (stages - 1) / chunks / slowest.num_microbatches
    if stages > 1:
        terms["bubble"] = bubble * sum(terms.values())
    per_microbatch = sum(terms.values()) / slowest.num_microbatches / (1 + bubble)
    terms["data"] = _data_seconds(slowest, config, hardware, per_microbatch_seconds=per_microbatch)
    terms["update"] = _compute_seconds(slowest.update, hardware, by_tensor=hardware.device == "cpu")
    for tally in (slowest.microbatches, slowest.update):
        for group in tally.wire_bytes:
            if group != "data" and (group not in PIPELINED_GROUPS or tally is slowest.update):
                terms[group] = terms.get(group, 0.0) + _group_seconds(slowest, tally, group, hardware)
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
    return {
        "compute": _compute_seconds(report.microbatches, hardware),
        **{
            group: _group_seconds(report, report.microbatches, group, hardware)
            for group in PIPELINED_GROUPS
            if group in report.microbatches.wire_bytes
        },
    }


def _data_seconds(
    report: RankReport, config: RunConfig, hardware: Hardware, *, per_microbatch_seconds: float
) -> float:
    """What the data-parallel ranks' exchange adds to the step, beyond what an overlap hides.

    The gradients' reduction hides behind the last microbatch's backward pass, two thirds of its time,
    and the parameters' gathering behind the next step's first forward pass, a third.
    """
    seconds = {"gather": 0.0, "reduce": 0.0}
    for tally in (report.microbatches, report.update):
        for operation in tally.wire_bytes.get("data", {}):
            kind = "gather" if operation.startswith("allgather") else "reduce"
            seconds[kind] += _wire_seconds(report, tally, "data", operation, hardware)
    if config.parallel.overlap_gradient_reduce:
        seconds["reduce"] = max(0.0, seconds["reduce"] - per_microbatch_seconds * 2 / 3)
    if config.parallel.overlap_parameter_gather:
        seconds["gather"] = max(0.0, seconds["gather"] - per_microbatch_seconds / 3)
    return sum(seconds.values())


def _compute_seconds(tally: Tally, hardware: Hardware, *, by_tensor: bool = True) -> float:
    """Of all operations; `by_tensor` where each is started by itself, and not for many tensors together.

    torch's AdamW goes tensor by tensor on CPU and over lists of tensors on a GPU.
    """
    working = sum(
        calls * working_seconds(operation, hardware) for operation, calls in tally.operations.items()
    )
    starts = sum(tally.operations.values()) if by_tensor else 0.0
    starting = 1e-6 * hardware.operation_microseconds * starts
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


def _group_seconds(report: RankReport, tally: Tally, group: str, hardware: Hardware) -> float:
    return sum(
        _wire_seconds(report, tally, group, operation, hardware) for operation in tally.wire_bytes[group]
    )


def _wire_seconds(report: RankReport, tally: Tally, group: str, operation: str, hardware: Hardware) -> float:
    """Bytes over the wire's rate, and in each call a latency for each doubling of the ranks."""
    ranks = report.group_ranks.get(group, report.group_ranks["other"])
    wire = hardware.wire_between(ranks)
    rate = 1e9 * wire.gigabytes_per_second * hardware.attainable.wire
    hops = 1 if operation == "send" else math.ceil(math.log2(max(2, len(ranks))))
    calls = tally.wire_calls[group][operation]
    return tally.wire_bytes[group][operation] / rate + 1e-6 * wire.latency_microseconds * hops * calls
