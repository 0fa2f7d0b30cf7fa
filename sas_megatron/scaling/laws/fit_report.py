"""All that is fitted to one table of runs: the law, its intervals, other approaches beside it, a prediction.

points -> without the highest losses -> law by Huber loss -> bootstrap -> intervals, isoFLOP intervals
                                     -> law by least squares -> profile likelihood
                                     -> law by variable projection
                                     -> law of all but the largest runs -> those predicted
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from sas_megatron.scaling.attempts import Attempts
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
from sas_megatron.scaling.numbers import format_share, without_infinities

NO_FLOPS = (
    "The points have no column flops: C = 6ND is assumed, which leaves attention's scores out. Variants that "
    "differ in them cannot be compared so."
)


@dataclass(frozen=True)
class ComputeOptimal:
    """The powers of C in the best N, the best D and the loss above E, and what the largest budget buys."""

    cost: TokenCost
    exponents: dict[str, float]
    ci95: dict[str, Interval]
    at_largest: Optimum


@dataclass(frozen=True)
class FitReport:
    """Everything `sas-megatron fit` prints; what could not be done is None, and why is among the remarks.

    `compute_law` and `pure_compute_law` (without E) are of loss over FLOPs along the runs that none beats for
    fewer.
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


def build_fit_report(
    points: Points, *, drop_highest: int = 0, num_draws: int = 1000, seed: int = 1, hold_out: float = 0.1
) -> FitReport:
    """Fits the law to the points, `hold_out` of which (a share) are predicted from the rest.

    Raises:
        FieldError: the points, or an option, do not allow the law to be fitted.
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

    return FitReport(
        fit=fit,
        dropped=dropped,
        ci95=percentile_intervals(draws),
        compute_optimal=_find_optimal(fit, draws, cost),
        compute_optimal_6nd=_find_optimal(fit, draws, TokenCost(6.0, 1.0, "6ND")),
        profile95=attempts.make(
            "profile likelihood", lambda: profile_intervals(fit_surface(points, delta=np.inf))
        ),
        projected=attempts.make("variable projection", lambda: project_surface(points)),
        isoflop=attempts.make("isoFLOP profiles", lambda: fit_isoflop(points, weights_RI=weights_RI)),
        compute_law=attempts.make("power law of compute", lambda: over_compute(irreducible=True)),
        pure_compute_law=attempts.make("pure power law of compute", lambda: over_compute(irreducible=False)),
        hold_out=attempts.make(
            "prediction of held-out runs",
            lambda: predict_largest(points, share=hold_out, num_draws=num_draws, seed=seed),
        ),
        # Last, when all has been tried.
        remarks=(*_remark_on_points(points), *_remark_on_fit(fit, draws), *attempts.remarks),
    )


def report_tree(report: FitReport) -> dict[str, Any]:
    """The report as JSON takes it; what is missing or infinite is null."""
    surface = report.fit.surface
    tree = {
        **dataclasses.asdict(surface),
        "objective": report.fit.fit.objective,
        "n_points": len(report.fit.points),
        "ci95": report.ci95,
        "compute_optimal": _optimal_tree(report.compute_optimal),
        "compute_optimal_6nd": _optimal_tree(report.compute_optimal_6nd),
        "profile95": report.profile95,
        "projection": None if report.projected is None else _projected_tree(report.projected),
        "isoflop": None if report.isoflop is None else dataclasses.asdict(report.isoflop),
        "compute_law": _compute_law_tree(report.compute_law),
        "pure_compute_law": _compute_law_tree(report.pure_compute_law),
        "hold_out": None if report.hold_out is None else _hold_out_tree(report.hold_out),
        "dropped": [
            {"params": params, "tokens": tokens, "loss": loss}
            for params, tokens, loss in zip(
                report.dropped.params.tolist(),
                report.dropped.tokens.tolist(),
                report.dropped.loss.tolist(),
                strict=True,
            )
        ],
        "remarks": report.remarks,
    }
    finite: dict[str, Any] = without_infinities(tree)
    return finite


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
    _, counts = np.unique(points.sizes, return_counts=True)
    if (counts == 1).all():
        remarks.append("No size has two runs, so the bootstrap draws from all runs as one stratum.")
    elif (single := int((counts == 1).sum())) > 1:
        remarks.append(f"{single} sizes have one run each and are one stratum of the bootstrap.")
    elif single:
        remarks.append("One size has a single run, which is in every draw of the bootstrap.")
    return remarks


def _remark_on_fit(fit: SurfaceFit, draws: Quantities) -> list[str]:
    remarks = []
    if fit.surface.E / fit.points.loss.min() < NEGLIGIBLE_SHARE:
        remarks.append("E is at its bound of zero: the points do not reach down to an irreducible loss.")
    exponents = np.stack([draws["alpha"], draws["beta"]])
    odd = ((exponents <= 0) | (exponents > LARGEST_EXPONENT)).any(axis=0).mean()
    if odd > 0:
        remarks.append(
            f"In {format_share(odd)} of the bootstrap draws an exponent is not between 0 and "
            f"{LARGEST_EXPONENT:g}; they count in the intervals."
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
