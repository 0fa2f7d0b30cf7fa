"""Complete fit of a scaling law to one table of runs: law, intervals, compute laws and a prediction.

points -> drop the highest losses -> Huber loss -> bootstrap -> intervals
                                  -> isoFLOP minima, compute laws along the frontier
                                  -> fit without the largest runs -> prediction of those
                                  -> if asked: least squares with profile likelihood, variable projection
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.data.epochs import describe_repeated_points
from sas_megatron.scaling.laws.hold_out import HoldOut, predict_largest
from sas_megatron.scaling.laws.isoflop import IsoflopFit, fit_isoflop
from sas_megatron.scaling.laws.loss_surface import (
    LARGEST_EXPONENT,
    Optimum,
    Quantities,
    SurfaceFit,
    TokenCost,
    check_determined,
    fit_surface,
    optimal_exponents,
    project_surface,
    surface_quantities,
)
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.laws.power_law import PowerLawFit, find_frontier, fit_power_law
from sas_megatron.scaling.laws.profile import OpenInterval, profile_intervals
from sas_megatron.scaling.laws.resampling import Interval, percentile_intervals
from sas_megatron.scaling.numbers import format_interval, format_share

_Result = TypeVar("_Result")
NO_FLOPS = (
    "The points have no column flops: C = 6ND is assumed, which excludes the attention scores. Variants that "
    "differ in their attention scores cannot be compared on this basis."
)


class Attempts:
    """Runs computations that the data may not allow; `remarks` gets a sentence for each that fails."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def run(self, name: str, function: Callable[[], _Result]) -> _Result | None:
        """Return the result of `function`, or None if it raises `FieldError`."""
        try:
            return function()
        except FieldError as error:
            self.remarks.append(f"No {name}: {error}.")
            return None


@dataclass(frozen=True)
class ComputeOptimal:
    """Exponents of C in the optimal N and D and the reducible loss, and the optimum of the largest budget."""

    cost: TokenCost
    exponents: dict[str, float]
    ci95: dict[str, Interval]
    at_largest: Optimum


@dataclass(frozen=True)
class OtherMethods:
    """Least squares of log residuals with intervals by profile likelihood, and variable projection."""

    least_squares: SurfaceFit | None
    profile95: dict[str, OpenInterval] | None
    projected: SurfaceFit | None


@dataclass(frozen=True)
class LawFit:
    """A fitted law L(N, D) with its intervals, and results that can be compared with it.

    Results that the points do not allow are None; `remarks` state why. `compute_law` and `pure_compute_law`
    (without E) are power laws of loss over FLOPs along the Pareto frontier of the runs. `other_methods` is
    None unless it was requested.
    """

    fit: SurfaceFit
    dropped: Points
    ci95: dict[str, Interval]
    compute_optimal: ComputeOptimal
    compute_optimal_6nd: ComputeOptimal
    isoflop: IsoflopFit | None
    compute_law: PowerLawFit | None
    pure_compute_law: PowerLawFit | None
    hold_out: HoldOut | None
    other_methods: OtherMethods | None
    remarks: tuple[str, ...]


def fit_law(
    points: Points,
    *,
    drop_highest: int = 0,
    num_draws: int = 1000,
    seed: int = 1,
    hold_out: float | None = 0.1,
    use_other_methods: bool = False,
) -> LawFit:
    """Fit the law to points and estimate its uncertainty.

    Args:
        points: Points of at least six runs.
        drop_highest: Number of points with the highest losses to leave out.
        num_draws: Bootstrap draws.
        seed: Seed of the bootstrap.
        hold_out: Fraction of the runs, those with the most FLOPs, that are predicted from the others; None
            for the runs of the largest size.
        use_other_methods: Whether to fit the law by the other methods as well.

    Raises:
        FieldError: The points or an option do not allow the law to be fitted.
    """
    points, dropped = points.drop_highest(drop_highest)
    fit = fit_surface(points)
    draws = surface_quantities(fit.problem, fit.resample(num_draws=num_draws, seed=seed))
    ci95 = percentile_intervals(draws)
    check_determined(points, ci95)
    attempts = Attempts()
    frontier = points.take(find_frontier(points.compute, points.loss))

    def over_compute(*, irreducible: bool) -> PowerLawFit:
        return fit_power_law(frontier.compute, frontier.loss, irreducible=irreducible)

    optimal = _find_optimal(fit, draws, TokenCost.of(points))
    isoflop = attempts.run("isoFLOP profiles", lambda: fit_isoflop(points))
    other = _fit_other_methods(points, attempts) if use_other_methods else None
    return LawFit(
        fit=fit,
        dropped=dropped,
        ci95=ci95,
        compute_optimal=optimal,
        compute_optimal_6nd=_find_optimal(fit, draws, TokenCost(6.0, 1.0, "6ND")),
        isoflop=isoflop,
        compute_law=attempts.run("power law of compute", lambda: over_compute(irreducible=True)),
        pure_compute_law=attempts.run("pure power law of compute", lambda: over_compute(irreducible=False)),
        hold_out=attempts.run(
            "prediction of held-out runs",
            lambda: predict_largest(points, share=hold_out, num_draws=num_draws, seed=seed),
        ),
        other_methods=other,
        # Evaluated last, after all attempts.
        remarks=(
            *_remark_on_points(points),
            *_remark_on_fit(ci95, draws),
            *_remark_on_isoflop(isoflop, optimal, num_points=len(points)),
            *_remark_on_other_methods(other, ci95),
            *attempts.remarks,
        ),
    )


def _fit_other_methods(points: Points, attempts: Attempts) -> OtherMethods:
    squares = attempts.run("least squares", lambda: fit_surface(points, delta=np.inf))
    profile = None
    # The likelihood of dependent checkpoints is not the product of their likelihoods.
    if squares is not None and points.runs is None:
        profile = profile_intervals(squares)
    return OtherMethods(
        squares, profile, attempts.run("variable projection", lambda: project_surface(points))
    )


def _find_optimal(fit: SurfaceFit, draws: Quantities, cost: TokenCost) -> ComputeOptimal:
    single = {name: np.array([value]) for name, value in dataclasses.asdict(fit.surface).items()}
    compute = fit.points.compute if cost.source == "flops" else fit.points.flops_6nd
    return ComputeOptimal(
        cost,
        {name: float(value[0]) for name, value in optimal_exponents(single, cost).items()},
        percentile_intervals(optimal_exponents(draws, cost)),
        fit.surface.optimum(float(compute.max()), cost),
    )


def _remark_on_points(points: Points) -> list[str]:
    remarks = [] if points.flops is not None else [NO_FLOPS]
    if points.epochs is not None:
        remarks += describe_repeated_points(points.epochs.tolist())
    distinct = np.unique(np.stack([points.params, points.tokens, points.loss]), axis=1).shape[1]
    if distinct < len(points):
        remarks.append(
            f"{len(points) - distinct} points have the parameters, tokens and loss of another point: if "
            "these are the same runs, the intervals are too narrow."
        )
    if points.runs is not None:
        remarks.append(
            f"The points are checkpoints of {points.num_runs} runs: the bootstrap draws whole runs, since "
            "the errors of a run's checkpoints are not independent."
        )
        return remarks
    _, counts = np.unique(points.sizes, return_counts=True)
    if (counts == 1).all():
        remarks.append("No size has two runs, so that all runs form one stratum of the bootstrap.")
    elif (single := int((counts == 1).sum())) > 1:
        remarks.append(f"{single} sizes have one run each and form one common stratum of the bootstrap.")
    elif single:
        remarks.append("One size has a single run, which every bootstrap draw contains.")
    return remarks


def _remark_on_fit(ci95: dict[str, Interval], draws: Quantities) -> list[str]:
    remarks = []
    if ci95["E"][0] == 0:
        remarks.append("The interval of E reaches zero: the points do not determine an irreducible loss.")
    exponents = np.stack([draws["alpha"], draws["beta"]])
    invalid = ((exponents <= 0) | (exponents > LARGEST_EXPONENT)).any(axis=0).mean()
    if invalid > 0:
        remarks.append(
            f"In {format_share(invalid)} of the bootstrap draws an exponent is not between 0 and "
            f"{LARGEST_EXPONENT:g}; these draws are included in the intervals."
        )
    return remarks


def _remark_on_isoflop(isoflop: IsoflopFit | None, optimal: ComputeOptimal, *, num_points: int) -> list[str]:
    if isoflop is None:
        return []
    remarks = []
    if isoflop.num_between:
        remarks.append(
            f"{isoflop.num_between} of {num_points} points are between the budgets of FLOPs and in no "
            "isoFLOP profile."
        )
    law, interval = optimal.exponents["params_exponent"], optimal.ci95["params_exponent"]
    own = isoflop.params_interval
    if own is not None and not (
        own[0] <= law <= own[1] or interval[0] <= isoflop.params_exponent <= interval[1]
    ):
        remarks.append(
            f"The isoFLOP minima give the exponent {isoflop.params_exponent:.3f} of the optimal N "
            f"({format_interval(own)}), the law {law:.3f} ({format_interval(interval)}): the law does not "
            "describe all of these runs."
        )
    return remarks


def _remark_on_other_methods(other: OtherMethods | None, ci95: dict[str, Interval]) -> list[str]:
    methods = {} if other is None else {"least squares": other.least_squares, "projection": other.projected}
    outside = [
        f"{name} {value:.4g} by {method}"
        for method, fit in methods.items()
        for name, value in ({} if fit is None else dataclasses.asdict(fit.surface)).items()
        if not ci95[name][0] <= value <= ci95[name][1]
    ]
    if not outside:
        return []
    return [
        f"Outside the law's intervals: {', '.join(outside)}. The methods weigh large residuals differently: "
        "look for outliers, or for runs that the law does not describe."
    ]
