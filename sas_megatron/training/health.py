"""Rules that decide, between the gradients and the update of a step, whether the step is harmful.

loss and gradient norm (the same on all ranks) -> findings -> apply or skip the update -> counts

The rank that caused a non-finite loss is known, because each rank has its own losses. The rank that caused a
non-finite gradient norm is not known, because gradients are summed over the data ranks first. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sas_megatron.config.monitoring import HealthConfig

Response = Literal["record", "skip", "stop"]
Quantity = Literal["loss", "gradient_norm"]

# 1/Φ⁻¹(3/4): the ratio of standard deviation to median absolute deviation in a normal distribution.
TO_STANDARD_DEVIATION = 1.4826
# Lower limit of the deviation, as a share of the median. Without it, any change of a nearly constant series
# would be a spike.
SMALLEST_DEVIATION = 0.01


class TrainingFault(RuntimeError):
    """Training cannot continue although the config is valid."""


@dataclass(frozen=True)
class Spike:
    """A value far above the median of the values before it; the excess is given in their deviations."""

    median: float
    deviations: float


@dataclass(frozen=True)
class Finding:
    """A loss or gradient norm that is a spike, or not finite (`spike` is None), and the response to it."""

    quantity: Quantity
    value: float
    spike: Spike | None
    response: Response


# (loss, gradient norm) -> findings.
StepCheck = Callable[[float, float], list[Finding]]


def find_non_finite(loss: float, gradient_norm: float) -> list[Finding]:
    """Return a finding for the loss if it is not finite, else for a gradient norm that is not finite.

    A non-finite loss always makes the gradients non-finite, so that one finding is enough.
    """
    values: list[tuple[Quantity, float]] = [("loss", loss), ("gradient_norm", gradient_norm)]
    return [Finding(name, value, None, "skip") for name, value in values if not math.isfinite(value)][:1]


def find_spike(value: float, previous: Sequence[float], *, threshold: float) -> Spike | None:
    """Return the spike if `value` exceeds the median of `previous` by more than `threshold` deviations.

    Medians are used because earlier spikes hardly change them. Only an increase is a spike: a loss that falls
    fast is not. If all previous values are 0, the scale is unknown, and the result is None.

    Args:
        value: The value to check; finite.
        previous: The values before it; finite, at least one.
        threshold: The number of deviations.
    """
    median = statistics.median(previous)
    spread = TO_STANDARD_DEVIATION * statistics.median(abs(earlier - median) for earlier in previous)
    deviation = max(spread, SMALLEST_DEVIATION * abs(median))
    excess = value - median
    if deviation == 0 or excess <= threshold * deviation:
        return None
    return Spike(median, excess / deviation)


@dataclass
class HealthHistory:
    """The values of the last updates, and counts since the run began; saved with the run's progress."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    skipped_steps: int = 0
    non_finite_losses: int = 0
    non_finite_gradients: int = 0
    loss_spikes: int = 0
    gradient_norm_spikes: int = 0
    # Rank (a string, as JSON requires) -> number of steps in which its own loss was not finite.
    non_finite_losses_by_rank: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """Return the cumulative counts, for summary.json."""
        excluded = ("losses", "gradient_norms", "skipped_in_a_row")
        return {name: value for name, value in asdict(self).items() if name not in excluded}


class HealthRules:
    """The rules of the `health` section, applied to the steps of a run; identical on every rank."""

    def __init__(self, config: HealthConfig, history: HealthHistory) -> None:
        self.config = config
        self.history = history

    def check_step(self, loss: float, gradient_norm: float) -> list[Finding]:
        """Return the findings for a step before its update."""
        findings = find_non_finite(loss, gradient_norm)
        if findings:
            return findings
        history: list[tuple[Quantity, float, list[float]]] = [
            ("loss", loss, self.history.losses),
            ("gradient_norm", gradient_norm, self.history.gradient_norms),
        ]
        for quantity, value, values in history:
            window = values[-self.config.spike_window :]
            if len(window) < self.config.spike_window:
                continue
            spike = find_spike(value, window, threshold=self.config.spike_threshold)
            if spike is not None:
                findings.append(Finding(quantity, value, spike, self.config.spike_response))
        return findings

    def count_update(self, loss: float, gradient_norm: float) -> None:
        """Append the values of a step whose update was applied."""
        for values, value in ((self.history.losses, loss), (self.history.gradient_norms, gradient_norm)):
            values.append(value)
            del values[: -self.config.spike_window]
        self.history.skipped_in_a_row = 0

    def count_finding(self, finding: Finding, ranks: Iterable[int]) -> None:
        """Add one finding to the counts.

        Args:
            finding: The finding.
            ranks: For a non-finite loss, the ranks whose own loss is not finite.
        """
        history = self.history
        if finding.spike is not None:
            history.loss_spikes += finding.quantity == "loss"
            history.gradient_norm_spikes += finding.quantity == "gradient_norm"
            return
        history.non_finite_losses += finding.quantity == "loss"
        history.non_finite_gradients += finding.quantity == "gradient_norm"
        for rank in map(str, ranks):
            by_rank = history.non_finite_losses_by_rank
            by_rank[rank] = by_rank.get(rank, 0) + 1

    def count_skip(self) -> None:
        """Add one step whose update was skipped."""
        self.history.skipped_in_a_row += 1
        self.history.skipped_steps += 1


def describe_finding(finding: Finding, *, loss: float, microbatches: Sequence[str]) -> str:
    """Return a description such as `the loss is not finite on rank 1 microbatch 0 (nan)`.

    Args:
        finding: The finding.
        loss: The mean loss of the step.
        microbatches: Descriptions of the microbatches with a non-finite loss.
    """
    name = finding.quantity.replace("_", " ")
    if finding.spike is not None:
        return (
            f"the {name} of {finding.value:.6g} is a spike, {finding.spike.deviations:.1f} deviations above "
            f"the median of {finding.spike.median:.6g}"
        )
    if finding.quantity == "loss":
        return f"the loss is not finite on {', '.join(microbatches) or 'the sum over ranks alone'}"
    return (
        f"the gradient norm is {finding.value} although the loss is {loss:.6g} "
        "(the rank is unknown, because gradients are summed over ranks)"
    )
