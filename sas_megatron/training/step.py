"""One optimizer step: forward and backward over the microbatches, the judgement, the update.

gradients -> their norm -> one sum over all ranks: loss, norm, who asks to stop -> judge -> update or not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import Batch
from sas_megatron.training.engine import Engine, Reports
from sas_megatron.training.health import Finding, Judge, find_non_finite


@dataclass(frozen=True)
class FaultyLoss:
    """A microbatch whose loss is not finite."""

    rank: int
    microbatch: int
    loss: float

    def __str__(self) -> str:
        return f"rank {self.rank} microbatch {self.microbatch} ({self.loss})"


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank.

    The loss is the mean over the step's tokens, and the gradient norm that before clipping; both are of
    before the update, which `is_applied` says was made.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    is_applied: bool
    findings: list[Finding]
    # Where the loss is not finite.
    faulty_losses: list[FaultyLoss]
    # Whether any rank was asked to stop.
    stop_is_asked: bool

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are numbers to record."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    *,
    num_microbatches: int,
    topology: Topology,
    judge: Judge = find_non_finite,
    asks_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Runs a step; weights, optimizer and schedule stay as they are where `judge` finds it harmful.

    Args:
        judge: Must answer alike on all ranks; it is given the same numbers on each.
        asks_to_stop: Whether this rank is asked to stop, told to the others with the loss.
    """
    reports = engine.accumulate(batches, num_microbatches=num_microbatches)
    own_norm = engine.measure_gradients()
    loss, gradient_norm, stop_is_asked = _agree(reports, own_norm, topology, asks_to_stop=asks_to_stop())
    findings = judge(loss, gradient_norm)
    is_applied = all(finding.response == "record" for finding in findings)
    if is_applied:
        engine.schedule.step(1)
        engine.update(own_norm)
    else:
        engine.drop_gradients()
    return StepResult(
        loss=loss,
        gradient_norm=gradient_norm,
        learning_rate=engine.schedule.get_lr({}),
        is_applied=is_applied,
        findings=findings,
        faulty_losses=[] if math.isfinite(loss) else _find_faulty_losses(reports),
        stop_is_asked=stop_is_asked,
    )


def _agree(
    reports: Reports, gradient_norm: float, topology: Topology, *, asks_to_stop: bool
) -> tuple[float, float, bool]:
    """Mean loss by token over all samples, gradient norm, and whether any rank is asked to stop.

    They are the same on every rank, to the bit: ranks that decided differently would wait for each other.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=topology.device)
    for report in reports:
        totals[:2] += report["loss"]
    # Of equal norms in float32 the mean is exact.
    totals[2] = gradient_norm
    totals[3] = asks_to_stop
    topology.sum_over_all_ranks(totals)
    norm = totals[2].item() / topology.world_size
    return (totals[0] / totals[1]).item(), norm, totals[3].item() > 0


def _find_faulty_losses(reports: Reports) -> list[FaultyLoss]:
    """Those of all ranks; all must call it."""
    own = [report["loss"][0].item() for report in reports]
    return [
        FaultyLoss(rank, microbatch, loss)
        for rank, losses in enumerate(gather_from_ranks(own))
        for microbatch, loss in enumerate(losses)
        if not math.isfinite(loss)
    ]
