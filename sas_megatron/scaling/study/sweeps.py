"""Results of a study's learning rate sweep, recorded once after all of its runs have finished."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import UserError
from sas_megatron.io.files import save_file
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study.layouts import read_layouts
from sas_megatron.scaling.study.learning_rates import (
    Trial,
    compare_with_law,
    extend_rates,
    find_best_rate,
    step_law_rate,
)
from sas_megatron.scaling.study.plan import Plan, PlannedRun, count_budget_tokens
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.recorded import RatesRecord, read_recorded
from sas_megatron.scaling.study.run_states import check_config, final_loss, is_settled
from sas_megatron.scaling.study.study_file import Study
from sas_megatron.scaling.study.study_table import SweepRun

RECORD = "learning_rates.json"


def plan_with_rates(study: Study, base: dict[str, Any]) -> Plan:
    """Return the plan, with the learning rates of the sweep if all of its runs have finished.

    The rates are recorded at that point, so that the later runs never change.

    Raises:
        UserError: As for `build_plan`; every run of a sweep diverged; the study was edited after the sweep;
            or a record is damaged.
    """
    layouts = read_layouts(study)
    plan = build_plan(study, base, layouts=layouts)
    if study.learning_rate.rule != "sweep":
        return plan
    record = Path(study.directory) / RECORD
    if not record.exists():
        trials = [run for run in plan.runs if run.role == "sweep"]
        if not all(is_settled(run) for run in trials):
            return plan
        for run in trials:
            # Otherwise its loss would be attributed to a different rate.
            check_config(run)
        text = json.dumps(_choose_rates(plan), indent=2) + "\n"
        save_file(record, text, remedy="choose another directory in the study file")
    chosen = _read_rates(record)
    found = {} if chosen is None else chosen.rates
    rates = {(variant, size): rate for variant, sizes in found.items() for size, rate in sizes.items()}
    for cell in plan.cells:
        if (cell.variant, cell.size) not in rates:
            raise UserError(
                f"{record}: has no learning rate for {cell.variant} at size {cell.size}, which the study now "
                "contains; restore the study file, choose another directory, or remove this record to "
                "determine all rates again (and remove the runs whose rates change)"
            )
    return build_plan(study, base, rates=rates, layouts=layouts)


def list_sweep_remarks(study: Study) -> tuple[str, ...]:
    """Return remarks on the learning rates of the results; empty without a finished sweep."""
    chosen = _read_rates(Path(study.directory) / RECORD) if study.learning_rate.rule == "sweep" else None
    if chosen is None:
        return ()
    remarks = []
    if chosen.multiples is not None:
        found = "; ".join(_describe(variant, sizes) for variant, sizes in chosen.multiples.items())
        remarks.append(
            "Learning rates follow the step law (1.79 N^−0.713 D^0.307, with D of the sweep's budget) "
            "times a factor per variant, the geometric mean over its sweeps of best rate / step law: "
            f"{found}."
        )
    if chosen.at_edge:
        remarks.append(
            f"The best learning rate of {', '.join(chosen.at_edge)} is the lowest or highest of its "
            "sweep: a wider sweep (learning_rate.factors) may find better rates and change the verdicts."
        )
    return tuple(remarks)


def list_sweep_runs(plan: Plan) -> tuple[SweepRun, ...]:
    """Return the runs of the sweep that have ended, with their losses."""
    return tuple(
        SweepRun(
            variant=run.cell.variant,
            size=run.cell.size,
            learning_rate=run.config.optimizer.learning_rate,
            loss=_read_loss(run),
            budget=float(run.budget),
            seed=run.seed,
        )
        for run in plan.runs
        if run.role == "sweep" and is_settled(run)
    )


def _read_loss(run: PlannedRun) -> float | None:
    return final_loss(run) if has_finished(run.directory) else None


def _read_rates(path: Path) -> RatesRecord | None:
    remedy = "restore it from a copy, or remove it to determine the rates from the sweep's runs again"
    return read_recorded(path, RatesRecord, remedy=remedy)


def _choose_rates(plan: Plan) -> dict[str, Any]:
    trials: dict[tuple[str, str], list[Trial]] = {}
    for run in plan.runs:
        if run.role == "sweep":
            trial = Trial(run.config.optimizer.learning_rate, _read_loss(run))
            trials.setdefault((run.cell.variant, run.cell.size), []).append(trial)
    best = {key: find_best_rate(tried) for key, tried in trials.items()}
    law: dict[str, dict[str, float]] = {}
    for cell in plan.cells:
        tokens = count_budget_tokens(plan.study, cell, plan.study.sweep_budget)
        # The sweep uses the first level of each further axis, which comes first in the plan.
        law.setdefault(cell.variant, {}).setdefault(
            cell.size, step_law_rate(cell.parameters_without_embeddings, tokens)
        )
    rates, multiples = {}, {}
    for variant, by_size in law.items():
        swept = {size: found.learning_rate for (name, size), found in best.items() if name == variant}
        rates[variant], multiples[variant] = extend_rates(swept, by_size), compare_with_law(swept, by_size)
    at_edge = [f"{variant}-{size}" for (variant, size), found in best.items() if found.at_edge]
    return {"rates": rates, "multiples": multiples, "at_edge": at_edge}


def _describe(variant: str, multiples: dict[str, float]) -> str:
    sizes = ", ".join(f"{multiple:.2f} at {size}" for size, multiple in multiples.items())
    return f"{variant} × {statistics.geometric_mean(multiples.values()):.2f} ({sizes})"
