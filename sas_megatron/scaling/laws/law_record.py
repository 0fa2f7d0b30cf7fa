"""A fitted law as JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from sas_megatron.scaling.laws.hold_out import HoldOut
from sas_megatron.scaling.laws.law_fit import ComputeOptimal, LawFit, OtherMethods
from sas_megatron.scaling.laws.power_law import PowerLawFit
from sas_megatron.scaling.numbers import replace_non_finite


def law_fit_record(law: LawFit) -> dict[str, Any]:
    """Return the fit as JSON values; missing and non-finite numbers are null."""
    surface = law.fit.surface
    tree = {
        **dataclasses.asdict(surface),
        "objective": law.fit.fit.objective,
        "n_points": len(law.fit.points),
        "n_runs": law.fit.points.num_runs,
        "ci95": law.ci95,
        "compute_optimal": _optimal_tree(law.compute_optimal),
        "compute_optimal_6nd": _optimal_tree(law.compute_optimal_6nd),
        **_other_methods_tree(law.other_methods or OtherMethods(None, None, None)),
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


def _optimal_tree(optimal: ComputeOptimal) -> dict[str, Any]:
    return {
        **optimal.exponents,
        "ci95": optimal.ci95,
        "flops_per_token": dataclasses.asdict(optimal.cost),
        "at_largest": dataclasses.asdict(optimal.at_largest),
    }


def _other_methods_tree(other: OtherMethods) -> dict[str, Any]:
    squares, projected = other.least_squares, other.projected
    return {
        "least_squares": None if squares is None else dataclasses.asdict(squares.surface),
        "profile95": other.profile95,
        "projection": None
        if projected is None
        else {**dataclasses.asdict(projected.surface), "squares": projected.fit.objective},
    }


def _compute_law_tree(fit: PowerLawFit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    return {**dataclasses.asdict(fit.law), "objective": fit.objective, "n_points": len(fit.problem.log_loss)}


def _hold_out_tree(hold_out: HoldOut) -> dict[str, Any]:
    return {
        "n_fitted": hold_out.num_fitted,
        "reach": hold_out.reach,
        "root_mean_square_error": hold_out.root_mean_square_error,
        "share_inside_noise95": hold_out.share_inside,
        "runs": [{**dataclasses.asdict(run), "relative_error": run.relative_error} for run in hold_out.runs],
    }
