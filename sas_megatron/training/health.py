"""Judges each step between its gradients and its update, and counts what was found.

loss, gradient norm (agreed on by all ranks) -> findings -> update or not -> counts, records, a fault

Whose samples made a loss not finite is known, as each rank has losses of its own. Of gradients it is
not: they are sums over the data ranks by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sas_megatron.config.health import HealthConfig
from sas_megatron.training.spikes import Spike, find_spike

Response = Literal["record", "skip", "stop"]
Quantity = Literal["loss", "gradient_norm"]


class TrainingFault(RuntimeError):
    """Training cannot go on, through no fault of the config's form."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step: a value that is not finite (`spike` is None) or far above those before."""

    quantity: Quantity
    value: float
    spike: Spike | None
    response: Response


# Loss and gradient norm -> findings; the update is made where each of these is only to be recorded.
Judge = Callable[[float, float], list[Finding]]


def find_non_finite(loss: float, gradient_norm: float) -> list[Finding]:
    """The first of the two that is not finite; a loss that is not makes gradients that are not."""
    values: list[tuple[Quantity, float]] = [("loss", loss), ("gradient_norm", gradient_norm)]
    return [Finding(name, value, None, "skip") for name, value in values if not math.isfinite(value)][:1]


@dataclass
class HealthHistory:
    """Values of the last updates, and counts since the run began; saved with its progress."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    skipped_steps: int = 0
    non_finite_losses: int = 0
    non_finite_gradients: int = 0
    loss_spikes: int = 0
    gradient_norm_spikes: int = 0
    # Rank, as a string -> steps in which its own loss was not finite.
    non_finite_losses_by_rank: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """For summary.json: all but the values and what is of the moment."""
        left_out = ("losses", "gradient_norms", "skipped_in_a_row")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


class HealthRules:
    """The rules of the `health` section over the steps of a run; alike on every rank."""

    def __init__(self, config: HealthConfig, history: HealthHistory) -> None:
        self.config = config
        self.history = history

    def judge(self, loss: float, gradient_norm: float) -> list[Finding]:
        """What is wrong with a step, before its update."""
        found = find_non_finite(loss, gradient_norm)
        if found:
            return found
        history: list[tuple[Quantity, float, list[float]]] = [
            ("loss", loss, self.history.losses),
            ("gradient_norm", gradient_norm, self.history.gradient_norms),
        ]
        for quantity, value, values in history:
            before = values[-self.config.spike_window :]
            if len(before) < self.config.spike_window:
                continue
            spike = find_spike(value, before, threshold=self.config.spike_threshold)
            if spike is not None:
                found.append(Finding(quantity, value, spike, self.config.spike_response))
        return found

    def count_update(self, loss: float, gradient_norm: float) -> None:
        """Remembers the values of a step whose update was made."""
        for values, value in ((self.history.losses, loss), (self.history.gradient_norms, gradient_norm)):
            values.append(value)
            del values[: -self.config.spike_window]
        self.history.skipped_in_a_row = 0

    def count_finding(self, finding: Finding, faulty_ranks: Iterable[int]) -> None:
        """Adds one finding to the counts."""
        history = self.history
        if finding.spike is not None:
            history.loss_spikes += finding.quantity == "loss"
            history.gradient_norm_spikes += finding.quantity == "gradient_norm"
            return
        history.non_finite_losses += finding.quantity == "loss"
        history.non_finite_gradients += finding.quantity == "gradient_norm"
        for rank in map(str, faulty_ranks):
            by_rank = history.non_finite_losses_by_rank
            by_rank[rank] = by_rank.get(rank, 0) + 1

    def count_skip(self) -> None:
        """Adds one step whose update was not made."""
        self.history.skipped_in_a_row += 1
        self.history.skipped_steps += 1


def describe_finding(finding: Finding, *, loss: float, culprits: Sequence[str]) -> str:
    """What is wrong, in words: `the loss is not finite on rank 1 microbatch 0 (nan)`."""
    name = finding.quantity.replace("_", " ")
    if finding.spike is not None:
        return (
            f"the {name} of {finding.value:.6g} is a spike, {finding.spike.deviations:.1f} deviations above "
            f"the median of {finding.spike.median:.6g}"
        )
    if finding.quantity == "loss":
        return f"the loss is not finite on {', '.join(culprits) or 'the sum over ranks alone'}"
    return (
        f"the gradient norm is {finding.value} although the loss is {loss:.6g} "
        "(which rank's samples did it is not known of a sum over ranks)"
    )
