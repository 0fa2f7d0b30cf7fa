"""Complete fit of a scaling law to one table of runs: law, intervals, alternative methods and a prediction.

points -> drop the highest losses -> Huber loss -> bootstrap -> intervals, isoFLOP intervals
                                  -> least squares -> profile likelihood
                                  -> variable projection
                                  -> fit without the largest runs -> prediction of those
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.data.epochs import describe_repeated_points
from sas_megatron.scaling.laws.hold_out import HoldOut, predict_largest
from sas_megatron.scaling.laws.isoflop import IsoflopFit, fit_isoflop
from sas_megatron.scaling.laws.loss_surface import (
    LARGEST_EXPONENT,
    NEGLIGIBLE_SHARE,
    Optimum,
    Quantities,
    SurfaceFit,
    TokenCost,
    fit_surface,
    optimal_exponents,
    project_surface,
    surface_quantities,
)
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.laws.power_law import PowerLawFit, find_frontier, fit_power_law
from sas_megatron.scaling.laws.profile import OpenInterval, profile_intervals
from sas_megatron.scaling.laws.resampling import Interval, draw_weights, percentile_intervals
from sas_megatron.scaling.numbers import format_share, replace_non_finite

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
class LawFit:
    """A fitted law L(N, D) with its intervals and alternative fits.

    Results that the points do not allow are None; `remarks` state why. `compute_law` and `pure_compute_law`
    (without E) are power laws of loss over FLOPs along the Pareto frontier of the runs.
    """

    fit: SurfaceFit
    dropped: Points
    ci95: dict[str, Interval]
    compute_optimal: ComputeOptimal
    compute_optimal_6nd: ComputeOptimal
    profile95: dict[str, OpenInterval] | None
    projected: SurfaceFit | None
    isoflop: IsoflopFit | None
    compute_law: PowerLawFit | None
    pure_compute_law: PowerLawFit | None
    hold_out: HoldOut | None
    remarks: tuple[str, ...]


def fit_law(
    points: Points, *, drop_highest: int = 0, num_draws: int = 1000, seed: int = 1, hold_out: float = 0.1
) -> LawFit:
    """Fit the law to points and estimate its uncertainty.

    Args:
        points: At least six runs.
        drop_highest: Number of points with the highest losses to leave out.
        num_draws: Bootstrap draws.
        seed: Seed of the bootstrap.
        hold_out: Fraction of the runs, the largest, that are predicted from the others.

    Raises:
        FieldError: The points or an option do not allow the law to be fitted.
    """
    points, dropped = points.drop_highest(drop_highest)
    fit = fit_surface(points)
    weights_RI = draw_weights(points.sizes.tolist(), num_draws=num_draws, seed=seed)
    draws = surface_quantities(fit.problem, fit.problem.refit(weights_RI, fit.fit))
    cost = TokenCost.of(points)
    attempts = Attempts()
    frontier = points.take(find_frontier(points.compute, points.loss))

    def over_compute(*, irreducible: bool) -> PowerLawFit:
        return fit_power_law(frontier.compute, frontier.loss, irreducible=irreducible)

    return LawFit(
        fit=fit,
        dropped=dropped,
        ci95=percentile_intervals(draws),
        compute_optimal=_find_optimal(fit, draws, cost),
        compute_optimal_6nd=_find_optimal(fit, draws, TokenCost(6.0, 1.0, "6ND")),
        profile95=attempts.run(
            "profile likelihood", lambda: profile_intervals(fit_surface(points, delta=np.inf))
        ),
        projected=attempts.run("variable projection", lambda: project_surface(points)),
        isoflop=attempts.run("isoFLOP profiles", lambda: fit_isoflop(points, weights_RI=weights_RI)),
        compute_law=attempts.run("power law of compute", lambda: over_compute(irreducible=True)),
        pure_compute_law=attempts.run("pure power law of compute", lambda: over_compute(irreducible=False)),
        hold_out=attempts.run(
            "prediction of held-out runs",
            lambda: predict_largest(points, share=hold_out, num_draws=num_draws, seed=seed),
        ),
        # Evaluated last, after all attempts.
        remarks=(*_remark_on_points(points), *_remark_on_fit(fit, draws), *attempts.remarks),
    )


def law_fit_record(law: LawFit) -> dict[str, Any]:
    """Return the fit as JSON values; missing and non-finite numbers are null."""
    surface = law.fit.surface
    tree = {
        **dataclasses.asdict(surface),
        "objective": law.fit.fit.objective,
        "n_points": len(law.fit.points),
        "ci95": law.ci95,
        "compute_optimal": _optimal_tree(law.compute_optimal),
        "compute_optimal_6nd": _optimal_tree(law.compute_optimal_6nd),
        "profile95": law.profile95,
        "projection": None if law.projected is None else _projected_tree(law.projected),
        "isoflop": None if law.isoflop is None else dataclasses.asdict(law.isoflop),
        "compute_law": _compute_law_tree(law.compute_law),
        "pure_compute_law": _compute_law_tree(law.pure_compute_law),
        "hold_out": None if law.hold_out is None else _hold_out_tree(law.hold_out),
        "dropped": [
            {"params": params, "tokens": tokens, "loss": loss}
            for params, tokens, loss in zip(
                law.dropped.params.tolist(),
                law.dropped.tokens.tolist(),
                law.dropped.loss.tolist(),
                strict=True,
            )
        ],
        "remarks": law.remarks,
    }
    record: dict[str, Any] = replace_non_finite(tree)
    return record


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
    _, counts = np.unique(points.sizes, return_counts=True)
    if (counts == 1).all():
        remarks.append("No size has two runs, so that all runs form one stratum of the bootstrap.")
    elif (single := int((counts == 1).sum())) > 1:
        remarks.append(f"{single} sizes have one run each and form one common stratum of the bootstrap.")
    elif single:
        remarks.append("One size has a single run, which every bootstrap draw contains.")
    return remarks


def _remark_on_fit(fit: SurfaceFit, draws: Quantities) -> list[str]:
    remarks = []
    if fit.surface.E / fit.points.loss.min() < NEGLIGIBLE_SHARE:
        remarks.append("E is at its lower bound of zero: the points do not determine an irreducible loss.")
    exponents = np.stack([draws["alpha"], draws["beta"]])
    invalid = ((exponents <= 0) | (exponents > LARGEST_EXPONENT)).any(axis=0).mean()
    if invalid > 0:
        remarks.append(
            f"In {format_share(invalid)} of the bootstrap draws an exponent is not between 0 and "
            f"{LARGEST_EXPONENT:g}; these draws are included in the intervals."
        )
    return remarks


def _optimal_tree(optimal: ComputeOptimal) -> dict[str, Any]:
    return {
        **optimal.exponents,
        "ci95": optimal.ci95,
        "flops_per_token": dataclasses.asdict(optimal.cost),
        "at_largest": dataclasses.asdict(optimal.at_largest),
    }


def _projected_tree(fit: SurfaceFit) -> dict[str, float]:
    return {**dataclasses.asdict(fit.surface), "squares": fit.fit.objective}


def _compute_law_tree(fit: PowerLawFit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    return {**dataclasses.asdict(fit.law), "objective": fit.objective, "n_points": len(fit.problem.log_loss)}


def _hold_out_tree(hold_out: HoldOut) -> dict[str, Any]:
    return {
        "n_fitted": hold_out.num_fitted,
        "reach": hold_out.reach,
        "root_mean_square_error": hold_out.root_mean_square_error,
        "share_inside_ci95": hold_out.share_inside,
        "runs": [{**dataclasses.asdict(run), "relative_error": run.relative_error} for run in hold_out.runs],
    }
