"""IsoFLOP profiles: the size with the lowest loss at each budget of FLOPs, and power laws of these minima.

FLOPs -> peaks of their density are the budgets -> mean loss of each size -> parabola through the five sizes
nearest the minimum -> line through the logarithms of the minima

Hoffmann et al. 2022, approach 2 (section 3.2). A parabola in log N is not the exact profile of the law: over
wide profiles it shifts the minimum, by different amounts at different budgets, and so biases the exponents
(arXiv 2603.22339). A local parabola follows the curve, as does the Akima spline of Porian et al. 2024 (arXiv
2406.19146). The profiles are a check of the surface fit, not a replacement.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray, IntArray
from sas_megatron.scaling.laws.points import Points, count_levels, find_levels
from sas_megatron.scaling.laws.resampling import LEVEL, Interval

# Standard deviation of the kernel of the density of log FLOPs, and the bins to which FLOPs are rounded.
KERNEL_WIDTH, BIN_WIDTH = 0.08, 0.004
# Two peaks are two budgets if the density between them falls below this share of the lower peak.
LARGEST_VALLEY = 0.5
# Runs further from the peak, in log FLOPs, belong to no budget.
BUDGET_REACH = 0.2
FEWEST_SIZES, LOCAL_SIZES, FEWEST_BUDGETS = 3, 5, 2
# The sizes nearest the minimum are chosen again after each fit, until they no longer change.
MAX_REFITS = 10


@dataclass(frozen=True)
class Profile:
    """The minimum of one budget: loss(N) = loss + curvature · log(N / params)² from `smallest` to `largest`.

    `smallest` and `largest` are the outermost of the sizes to which the parabola is fitted.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    num_points: int
    curvature: float
    smallest: float
    largest: float


@dataclass(frozen=True)
class IsoflopFit:
    """Minima by budget, and the exponents of C in the optimal N and the optimal D.

    Intervals are the 95 % t intervals of the lines through the minima, None with two budgets.
    `without_minimum` counts the budgets whose lowest loss is not between the trained sizes, and `num_between`
    the runs that belong to no budget.
    """

    profiles: tuple[Profile, ...]
    params_exponent: float
    tokens_exponent: float
    params_interval: Interval | None
    tokens_interval: Interval | None
    without_minimum: int
    num_between: int


class _Minimum(NamedTuple):
    """The sizes to which a parabola is fitted, and the position, value and curvature of its minimum."""

    fitted: IntArray
    position: float
    value: float
    curvature: float


def fit_isoflop(points: Points) -> IsoflopFit:
    """Fit the profiles, and lines through the logarithms of their minima.

    Raises:
        FieldError: Fewer than two budgets have three sizes with a minimum between them.
    """
    groups = group_budgets(points.compute)
    profiles, without = [], 0
    for group in groups:
        chosen = points.take(group)
        if count_levels(chosen.params) < FEWEST_SIZES:
            continue
        if (profile := _fit_profile(chosen)) is None:
            without += 1
        else:
            profiles.append(profile)
    if len(profiles) < FEWEST_BUDGETS:
        raise FieldError(
            "isoFLOP profiles",
            len(profiles),
            f"needs {FEWEST_BUDGETS} budgets of FLOPs with {FEWEST_SIZES} sizes and the lowest loss inside",
            "train several sizes at equal FLOPs",
        )
    log_flops = np.log([profile.flops for profile in profiles])
    params = _fit_line(log_flops, np.log([profile.params for profile in profiles]))
    tokens = _fit_line(log_flops, np.log([profile.tokens for profile in profiles]))
    num_between = len(points) - sum(len(group) for group in groups)
    return IsoflopFit(tuple(profiles), params[0], tokens[0], params[1], tokens[1], without, num_between)


def group_budgets(flops: FloatArray) -> list[IntArray]:
    """Return the indices of the runs of each budget, in ascending order of FLOPs.

    Nominal budgets that differ by rounding are one peak of the density. Runs between the peaks, or in the
    valleys of a continuum of FLOPs, belong to no budget.
    """
    log_flops = np.log(flops)
    start = log_flops.min() - 4 * KERNEL_WIDTH
    bins = np.round((log_flops - start) / BIN_WIDTH).astype(int)
    counts = np.bincount(bins, minlength=bins.max() + round(4 * KERNEL_WIDTH / BIN_WIDTH) + 1)
    steps = np.arange(-4 * KERNEL_WIDTH, 4 * KERNEL_WIDTH + BIN_WIDTH / 2, BIN_WIDTH) / KERNEL_WIDTH
    density = np.convolve(counts, np.exp(-(steps**2) / 2), mode="same")
    peaks = start + BIN_WIDTH * np.array(_find_peaks(density))
    nearest = np.searchsorted((peaks[1:] + peaks[:-1]) / 2, log_flops)
    is_near = np.abs(log_flops - peaks[nearest]) <= BUDGET_REACH
    groups = [np.flatnonzero(is_near & (nearest == number)) for number in range(len(peaks))]
    return [group for group in groups if len(group)]


def _find_peaks(density: FloatArray) -> list[int]:
    """Return the peaks that a deep valley separates from their neighbours, in ascending order."""
    rises = np.diff(density, prepend=0) > 0
    falls = np.diff(density, append=0) <= 0
    peaks = np.flatnonzero(rises & falls).tolist()
    while True:
        # Remove the lowest peak with a shallow valley on one side, since its runs belong to a higher peak.
        valleys = [density[low:high].min() for low, high in itertools.pairwise(peaks)]
        around = [max(sides) for sides in zip([0.0, *valleys], [*valleys, 0.0], strict=True)]
        shallow = [
            number for number, peak in enumerate(peaks) if around[number] > LARGEST_VALLEY * density[peak]
        ]
        if not shallow:
            return peaks
        peaks.pop(min(shallow, key=lambda number: density[peaks[number]]))


def _fit_profile(points: Points) -> Profile | None:
    """Fit the runs of one budget; return None if no minimum is between their sizes."""
    level_I = find_levels(points.params)
    count_S = np.bincount(level_I)
    log_params_S, log_tokens_S, loss_S = (
        np.bincount(level_I, values) / count_S
        for values in (np.log(points.params), np.log(points.tokens), points.loss)
    )
    minimum = _fit_minimum(log_params_S, loss_S)
    if minimum is None:
        return None
    fitted = minimum.fitted
    # At equal FLOPs, the tokens are nearly a power of the size.
    log_tokens = np.polyval(np.polyfit(log_params_S[fitted] - minimum.position, log_tokens_S[fitted], 1), 0.0)
    return Profile(
        flops=float(np.exp(np.log(points.compute).mean())),
        params=float(np.exp(minimum.position)),
        tokens=float(np.exp(log_tokens)),
        loss=minimum.value,
        num_points=len(points),
        curvature=minimum.curvature,
        smallest=float(np.exp(log_params_S[fitted[0]])),
        largest=float(np.exp(log_params_S[fitted[-1]])),
    )


def _fit_minimum(log_size_S: FloatArray, loss_S: FloatArray) -> _Minimum | None:
    """Fit a parabola to the sizes nearest its minimum; return None if no minimum is between them."""
    minimum: _Minimum | None = None
    position = float(log_size_S[loss_S.argmin()])
    for _ in range(MAX_REFITS):
        nearest = np.argsort(np.abs(log_size_S - position), kind="stable")[:LOCAL_SIZES]
        fitted = np.sort(nearest)
        if minimum is not None and np.array_equal(fitted, minimum.fitted):
            break
        x = log_size_S[fitted] - position
        curvature, slope, constant = (float(value) for value in np.polyfit(x, loss_S[fitted], 2))
        if curvature <= 0 or not x[0] <= -slope / (2 * curvature) <= x[-1]:
            return None
        position -= slope / (2 * curvature)
        minimum = _Minimum(fitted, position, constant - slope**2 / (4 * curvature), curvature)
    return minimum


def _fit_line(x: FloatArray, y: FloatArray) -> tuple[float, Interval | None]:
    """Return the slope of the least-squares line and its t interval, None with two points."""
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    degrees = len(x) - 2
    if degrees < 1:
        return slope, None
    residuals = y - y.mean() - slope * centred
    error = np.sqrt(residuals @ residuals / degrees / (centred @ centred))
    half = float(special.stdtrit(degrees, (1 + LEVEL) / 2) * error)
    return slope, (slope - half, slope + half)
