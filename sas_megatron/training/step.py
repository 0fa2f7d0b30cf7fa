"""One optimizer step: forward and backward over the microbatches, the check of the loss, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sas_megatron.model.language_loss import Batch
from sas_megatron.parallel.topology import Topology
from sas_megatron.training.engine import Engine, Reports


class TrainingFault(RuntimeError):
    """Training cannot go on, through no fault of the config's form."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured; the loss is the mean over the step's tokens, before the update."""

    loss: float
    gradient_norm: float
    learning_rate: float
    # Whether any rank was asked to stop; the same on all.
    stop_is_asked: bool = False


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    *,
    step: int,
    num_microbatches: int,
    topology: Topology,
    asks_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Runs step number `step` (from 1).

    Args:
        asks_to_stop: Whether this rank is asked to stop, told to the others with the loss.

    Raises:
        TrainingFault: the loss is not finite, and the weights are as before the step; or the gradient
            norm is not, and the weights are lost: the last checkpoint is what counts.
    """
    reports = engine.accumulate(batches, num_microbatches=num_microbatches)
    loss, stop_is_asked = _agree(reports, topology, asks_to_stop=asks_to_stop())
    if not math.isfinite(loss):
        raise TrainingFault(_describe_non_finite(reports, step, topology))
    engine.schedule.step(1)
    gradient_norm = engine.update()
    if not math.isfinite(gradient_norm):
        raise TrainingFault(
            f"step {step}: the gradient norm is {gradient_norm} on rank {topology.rank} "
            f"although the loss is {loss}; "
            "lower optimizer.learning_rate, or train in float32 to see whether precision is the cause"
        )
    return StepResult(
        loss=loss,
        gradient_norm=gradient_norm,
        learning_rate=engine.schedule.get_lr({}),
        stop_is_asked=stop_is_asked,
    )


def _agree(reports: Reports, topology: Topology, *, asks_to_stop: bool) -> tuple[float, bool]:
    """Mean loss by token over all samples, and whether any rank is asked to stop: the same on every rank."""
    totals = torch.zeros(3, dtype=torch.float64, device=topology.device)
    for report in reports:
        totals[:2] += report["loss"]
    totals[2] = asks_to_stop
    topology.sum_over_all(totals)
    return (totals[0] / totals[1]).item(), totals[2].item() > 0


def _describe_non_finite(reports: Reports, step: int, topology: Topology) -> str:
    """Names every rank whose own microbatches are at fault; all ranks must call it."""
    mine = [report["loss"][0].item() for report in reports]
    of_ranks: list[list[float]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(of_ranks, mine)
    culprits = [
        f"rank {rank} microbatch {index} ({loss})"
        for rank, losses in enumerate(of_ranks)
        for index, loss in enumerate(losses)
        if not math.isfinite(loss)
    ]
    return (
        f"step {step}: the loss is not finite on {', '.join(culprits)}; "
        "lower optimizer.learning_rate or look at that step's samples"
    )
