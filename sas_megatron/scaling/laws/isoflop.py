"""IsoFLOP profiles: a parabola of loss over log size for each budget, and power laws of the minima.

Hoffmann et al. 2022, approach 2 (section 3.2). A parabola is not the exact profile of the law, so that the
exponents are biased if the sizes are mostly on one side of the minimum (arXiv 2603.22339). It is a check of
the surface fit, not a replacement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray, IntArray
from sas_megatron.scaling.laws.points import Points, count_levels
from sas_megatron.scaling.laws.resampling import Interval, percentile_interval

# Runs belong to one budget if their FLOPs exceed the lowest of the group by at most this share.
SAME_BUDGET = 0.1
FEWEST_SIZES, FEWEST_BUDGETS = 3, 2
# An interval needs most of the draws; in the others, too few sizes were drawn for a minimum.
LEAST_SHARE_OF_DRAWS = 0.9


@dataclass(frozen=True)
class Profile:
    """The minimum of the parabola of one budget."""

    flops: float
    params: float
    tokens: float
    loss: float
    num_points: int


@dataclass(frozen=True)
class IsoflopFit:
    """Minima by budget, and the exponents of C in the optimal N and the optimal D.

    Intervals are None without a bootstrap. `without_minimum` counts the budgets whose minimum is outside the
    trained sizes.
    """

    profiles: tuple[Profile, ...]
    params_exponent: float
    tokens_exponent: float
    params_interval: Interval | None
    tokens_interval: Interval | None
    without_minimum: int


def fit_isoflop(points: Points, *, weights_RI: FloatArray | None = None) -> IsoflopFit:
    """Fit the profiles, and lines through the logarithms of their minima.

    Args:
        points: The runs.
        weights_RI: Bootstrap draws for the intervals.

    Raises:
        FieldError: Fewer than two budgets have three sizes with a minimum between them.
    """
    ones_1I = np.ones((1, len(points)))
    profiles, members, without = [], [], 0
    for group in group_budgets(points.compute):
        chosen = points.take(group)
        if count_levels(chosen.params) < FEWEST_SIZES:
            continue
        log_params, log_loss = _find_minima(np.log(chosen.params), chosen.loss, ones_1I[:, group])
        log_tokens, _ = _find_minima(np.log(chosen.tokens), chosen.loss, ones_1I[:, group])
        if np.isnan(log_params[0]) or np.isnan(log_tokens[0]):
            without += 1
            continue
        flops = float(np.exp(np.log(chosen.compute).mean()))
        profiles.append(
            Profile(
                flops,
                float(np.exp(log_params[0])),
                float(np.exp(log_tokens[0])),
                float(log_loss[0]),
                len(group),
            )
        )
        members.append(group)
    if len(profiles) < FEWEST_BUDGETS:
        raise FieldError(
            "isoFLOP profiles",
            len(profiles),
            f"needs {FEWEST_BUDGETS} budgets of FLOPs with {FEWEST_SIZES} sizes and the lowest loss inside",
            "train several sizes at equal FLOPs",
        )
    log_flops = np.log([profile.flops for profile in profiles])
    exponents = {
        name: float(_slopes(log_flops, np.log([[getattr(profile, name) for profile in profiles]]))[0])
        for name in ("params", "tokens")
    }
    intervals = (
        dict.fromkeys(exponents, None)
        if weights_RI is None
        else {name: _interval(log_flops, points, members, name, weights_RI) for name in exponents}
    )
    return IsoflopFit(
        tuple(profiles),
        exponents["params"],
        exponents["tokens"],
        intervals["params"],
        intervals["tokens"],
        without,
    )


def group_budgets(flops: FloatArray) -> list[IntArray]:
    """Return the indices of the points of each budget, in ascending order."""
    order = np.argsort(flops, kind="stable")
    groups: list[list[int]] = []
    for index in order:
        if groups and flops[index] <= flops[groups[-1][0]] * (1 + SAME_BUDGET):
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [np.array(group) for group in groups]


def _interval(
    log_flops: FloatArray, points: Points, members: list[IntArray], name: str, weights_RI: FloatArray
) -> Interval | None:
    minima_RB = np.stack(
        [
            _find_minima(np.log(getattr(points, name)[group]), points.loss[group], weights_RI[:, group])[0]
            for group in members
        ],
        axis=1,
    )
    slopes_R = _slopes(log_flops, minima_RB)
    known = np.isfinite(slopes_R)
    return percentile_interval(slopes_R[known]) if known.mean() >= LEAST_SHARE_OF_DRAWS else None


def _find_minima(
    log_size_I: FloatArray, loss_I: FloatArray, weights_RI: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the position and the loss of each row's minimum; NaN if it is outside the sizes."""
    centre, spread = log_size_I.mean(), np.ptp(log_size_I) / 2
    x_I = (log_size_I - centre) / spread
    powers_PI = np.stack([np.ones_like(x_I), x_I, x_I**2])
    gram_RPP = np.einsum("ri,pi,qi->rpq", weights_RI, powers_PI, powers_PI)
    target_RP = np.einsum("ri,pi,i->rp", weights_RI, powers_PI, loss_I)
    solvable = np.linalg.cond(gram_RPP) < 1e10
    gram_RPP[~solvable] = np.eye(3)
    constant, slope, curvature = np.linalg.solve(gram_RPP, target_RP[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        lowest_R = -slope / (2 * curvature)
    inside = solvable & (curvature > 0) & (np.abs(lowest_R) <= 1)
    loss_R = constant - slope**2 / (4 * np.where(inside, curvature, 1))
    return np.where(inside, centre + spread * lowest_R, np.nan), np.where(inside, loss_R, np.nan)


def _slopes(log_flops_B: FloatArray, minima_RB: FloatArray) -> FloatArray:
    """Return the slope of each row's line through the budgets with a minimum; NaN with fewer than two."""
    present_RB = np.isfinite(minima_RB)
    count_R1 = np.maximum(present_RB.sum(axis=1, keepdims=True), 1)
    x_RB = np.where(present_RB, log_flops_B, 0.0)
    y_RB = np.where(present_RB, minima_RB, 0.0)
    x_RB = np.where(present_RB, x_RB - x_RB.sum(axis=1, keepdims=True) / count_R1, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes: FloatArray = (x_RB * y_RB).sum(axis=1) / (x_RB**2).sum(axis=1)
    return np.where(present_RB.sum(axis=1) >= FEWEST_BUDGETS, slopes, np.nan)
