"""What a spike is: a rule of medians, which spikes among the earlier values hardly move. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 1/Φ⁻¹(3/4): times it, the median absolute deviation of normal values estimates their standard deviation.
TO_STANDARD_DEVIATION = 1.4826
# Of the median: values that hardly differ have hardly a spread, and any change would be a spike.
SMALLEST_DEVIATION = 0.01


@dataclass(frozen=True)
class Spike:
    """A value far above the median of those before, in deviations of theirs."""

    median: float
    deviations: float


def find_spike(value: float, before: Sequence[float], *, threshold: float) -> Spike | None:
    """The spike that `value` is among the finite values `before`, if it is one.

    Only upwards: a loss that falls fast is none. Where all values before are 0, there is no scale and none.
    """
    median = statistics.median(before)
    spread = TO_STANDARD_DEVIATION * statistics.median(abs(earlier - median) for earlier in before)
    deviation = max(spread, SMALLEST_DEVIATION * abs(median))
    excess = value - median
    if deviation == 0 or excess <= threshold * deviation:
        return None
    return Spike(median, excess / deviation)
