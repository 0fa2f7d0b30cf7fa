"""One optimizer step on all ranks.

microbatches -> forward and backward -> gradient norm -> sum over all ranks -> check -> update, or skip

The sum gives every rank the same mean loss, gradient norm and stop request, bit for bit. All ranks
therefore make the same decision about the update without further communication.
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
from sas_megatron.training.health import Finding, StepCheck, find_non_finite


@dataclass(frozen=True)
class NonFiniteLoss:
    """A microbatch whose loss is not finite."""

    rank: int
    microbatch: int
    loss: float

    def __str__(self) -> str:
        return f"rank {self.rank} microbatch {self.microbatch} ({self.loss})"


@dataclass(frozen=True)
class StepResult:
    """The measurements of one step, the same on every rank.

    Loss and gradient norm are those before the update.
    """

    # Mean over the tokens of the step.
    loss: float
    # Before clipping.
    gradient_norm: float
    learning_rate: float
    # Whether the update was applied.
    is_applied: bool
    findings: list[Finding]
    # Empty if the mean loss is finite.
    non_finite_losses: list[NonFiniteLoss]
    # Whether any rank was asked to stop.
    stop_requested: bool

    @property
    def is_finite(self) -> bool:
        """Whether both loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    *,
    num_microbatches: int,
    topology: Topology,
    check: StepCheck = find_non_finite,
    stop_requested: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Run one optimizer step; every rank must call it.

    Args:
        engine: Holds model, optimizer and schedule.
        batches: This rank's microbatches; the step reads `num_microbatches` of them.
        num_microbatches: Microbatches of this rank.
        topology: This rank's process groups.
        check: Returns the findings for a loss and a gradient norm. The update is applied only if all findings
            have the response `record`. It must be deterministic, because every rank calls it.
        stop_requested: Returns whether this rank was asked to stop; called after the backward pass.
    """
    reports = engine.forward_backward(batches, num_microbatches=num_microbatches)
    loss, gradient_norm, any_stop_requested = _reduce_over_ranks(
        reports, engine.compute_gradient_norm(), topology, stop_requested=stop_requested()
    )
    findings = check(loss, gradient_norm)
    is_applied = all(finding.response == "record" for finding in findings)
    if is_applied:
        engine.schedule.step(1)
        engine.update(gradient_norm)
    else:
        engine.skip_update()
    return StepResult(
        loss=loss,
        gradient_norm=gradient_norm,
        learning_rate=engine.schedule.get_lr({}),
        is_applied=is_applied,
        findings=findings,
        non_finite_losses=[] if math.isfinite(loss) else _gather_non_finite_losses(reports),
        stop_requested=any_stop_requested,
    )


def _reduce_over_ranks(
    reports: Reports, gradient_norm: float | torch.Tensor, topology: Topology, *, stop_requested: bool
) -> tuple[float, float, bool]:
    """Return the mean loss per token, the gradient norm, and whether any rank was asked to stop.

    The results are bit-identical on all ranks: ranks that decided differently would deadlock.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=topology.device)
    for report in reports:
        totals[:2] += report["loss"]  # summed loss, number of tokens
    # The norm is the same float32 number on every rank, so its mean in float64 is exact.
    totals[2] = gradient_norm
    totals[3] = stop_requested
    topology.sum_over_all_ranks(totals)
    totals[0] /= totals[1]
    loss, _, sum_of_norms, stops = totals.tolist()  # the only read of a device tensor in a step
    return loss, sum_of_norms / topology.world_size, stops > 0


def _gather_non_finite_losses(reports: Reports) -> list[NonFiniteLoss]:
    """Return the non-finite losses of all ranks; every rank must call it."""
    local_losses = [report["loss"][0].item() for report in reports]
    return [
        NonFiniteLoss(rank, microbatch, loss)
        for rank, losses in enumerate(gather_from_ranks(local_losses))
        for microbatch, loss in enumerate(losses)
        if not math.isfinite(loss)
    ]
