"""Estimate the time of an optimizer step from the work of its ranks and the hardware figures. No torch.

An operation takes the longer of its compute time and its memory time (roofline: Williams, Waterman,
Patterson 2009), and a launch time. A step of m microbatches on p stages of v chunks takes

    (m + (p-1)/v) · [compute + tensor + context + pipeline] + data + update

where the bracket is the time of one microbatch on the slowest stage (pipeline bubble: Narayanan et al. 2021,
arXiv 2104.04473, section 2.2). Communication overlaps with computation only as `parallel.overlap_*` states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.workload import Operation, Workload

if TYPE_CHECKING:
    from sas_megatron.planning.rank_estimate import RankReport


# Groups that communicate in every microbatch; the other groups communicate once per step.
PIPELINED_GROUPS = ("tensor", "context", "pipeline")


@dataclass(frozen=True)
class StepEstimate:
    """Time of one optimizer step by term."""

    # compute, bubble, update, and the exposed communication time of each group of ranks
    terms_seconds: dict[str, float]
    # Idle time over busy time of the pipeline: (p-1)/(v·m).
    bubble: float
    tokens: int
    # Model FLOPs, as `costs` counts them without recomputation, over the peak FLOPs of all devices.
    model_flops_utilization: float

    @property
    def seconds(self) -> float:
        """Seconds of the complete step."""
        return sum(self.terms_seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all ranks together."""
        return self.tokens / self.seconds


def estimate_step(
    config: RunConfig, reports: list[RankReport], *, hardware: Hardware, world_size: int
) -> StepEstimate:
    """Estimate the time of a step from reports that include its slowest stage, in any order.

    Raises:
        UserError: The hardware file lacks a figure that is needed.
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
    terms["update"] = _compute_seconds(slowest.update, hardware)
    for workload in (slowest.microbatches, slowest.update):
        for group in workload.bytes_sent:
            if group != "data" and (group not in PIPELINED_GROUPS or workload is slowest.update):
                terms[group] = terms.get(group, 0.0) + _group_seconds(slowest, workload, group, hardware)
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
    """Return the time of all microbatches on one stage, by term."""
    return {
        "compute": _compute_seconds(report.microbatches, hardware),
        **{
            group: _group_seconds(report, report.microbatches, group, hardware)
            for group in PIPELINED_GROUPS
            if group in report.microbatches.bytes_sent
        },
    }


def _data_seconds(
    report: RankReport, config: RunConfig, hardware: Hardware, *, per_microbatch_seconds: float
) -> float:
    """Return the time of the data-parallel communication that does not overlap with computation.

    The reduction of the gradients overlaps with the backward pass of the last microbatch, which takes two
    thirds of the time of a microbatch. The all-gather of the parameters overlaps with the first forward pass
    of the next step, which takes one third.
    """
    seconds = {"gather": 0.0, "reduce": 0.0}
    for workload in (report.microbatches, report.update):
        for operation in workload.bytes_sent.get("data", {}):
            kind = "gather" if operation.startswith("allgather") else "reduce"
            seconds[kind] += _communication_seconds(report, workload, "data", operation, hardware)
    if config.parallel.overlap_gradient_reduce:
        seconds["reduce"] = max(0.0, seconds["reduce"] - per_microbatch_seconds * 2 / 3)
    if config.parallel.overlap_parameter_gather:
        seconds["gather"] = max(0.0, seconds["gather"] - per_microbatch_seconds / 3)
    return sum(seconds.values())


def _compute_seconds(workload: Workload, hardware: Hardware) -> float:
    """Return the time of all operations, each of which has a launch; some operate on lists of tensors."""
    executing = sum(
        calls * execution_seconds(operation, hardware) for operation, calls in workload.operations.items()
    )
    num_launches = sum(workload.operations.values())
    launching = 1e-6 * hardware.operation_microseconds * num_launches
    # A GPU executes operations while the host launches the next ones; a CPU does one after the other.
    return max(executing, launching) if hardware.device == "gpu" else executing + launching


def execution_seconds(operation: Operation, hardware: Hardware) -> float:
    """Return the longer of the compute time and the memory time of an operation."""
    shares = hardware.attainable
    memory = operation.traffic_bytes / (1e9 * hardware.memory_gigabytes_per_second * shares.memory)
    if operation.kind == "elementwise":
        return memory
    share: float = getattr(shares, operation.kind)
    return max(memory, operation.executed_flops / (hardware.matrix_rate(operation.dtype) * share))


def _group_seconds(report: RankReport, workload: Workload, group: str, hardware: Hardware) -> float:
    return sum(
        _communication_seconds(report, workload, group, operation, hardware)
        for operation in workload.bytes_sent[group]
    )


def _communication_seconds(
    report: RankReport, workload: Workload, group: str, operation: str, hardware: Hardware
) -> float:
    """Return the bytes over the bandwidth, plus ⌈log₂ ranks⌉ latencies per collective call."""
    ranks = report.group_ranks.get(group, report.group_ranks["other"])
    link = hardware.link_between(ranks)
    bandwidth = 1e9 * link.gigabytes_per_second * hardware.attainable.link
    hops = 1 if operation == "send" else math.ceil(math.log2(max(2, len(ranks))))
    calls = workload.collective_calls[group][operation]
    return workload.bytes_sent[group][operation] / bandwidth + 1e-6 * link.latency_microseconds * hops * calls
