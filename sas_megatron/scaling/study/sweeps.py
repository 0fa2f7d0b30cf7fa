"""What a study's sweep found, once all its runs have finished; then it stands."""

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
    BestRate,
    Trial,
    extend_rates,
    find_best_rate,
    multiples_of_law,
    step_law_rate,
)
from sas_megatron.scaling.study.plan import Plan, build_plan, wanted_tokens
from sas_megatron.scaling.study.run_states import check_as_planned, final_loss, is_settled
from sas_megatron.scaling.study.study_file import Study

RECORD = "learning_rates.json"


def plan_with_rates(study: Study, base: dict[str, Any]) -> Plan:
    """The plan as far as the sweep has come: with its rates where it has been run to its end.

    They are written down then, so that the runs after it never change.

    Raises:
        UserError: as `build_plan`, or every run of a sweep diverged, or the study was edited since.
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
            # Else its loss would count for another rate than it had.
            check_as_planned(run)
        text = json.dumps(_choose_rates(plan), indent=2) + "\n"
        save_file(record, text, remedy="choose another directory in the study file")
    chosen = json.loads(record.read_text(encoding="utf-8"))
    rates = {
        (variant, size): rate for variant, sizes in chosen["rates"].items() for size, rate in sizes.items()
    }
    for cell in plan.cells:
        if (cell.variant, cell.size) not in rates:
            raise UserError(
                f"{record}: has no learning rate for {cell.variant} at size {cell.size}, which the study now "
                "names; put the study's file back, choose another directory, or remove this record to have "
                "the rates of all found again (runs whose rates change then must be removed, too)"
            )
    return build_plan(study, base, rates=rates, layouts=layouts)


def sweep_remarks(study: Study) -> tuple[str, ...]:
    """What a reader of the results must know of their learning rates; nothing before a sweep has ended."""
    record = Path(study.directory) / RECORD
    if study.learning_rate.rule != "sweep" or not record.exists():
        return ()
    chosen = json.loads(record.read_text(encoding="utf-8"))
    remarks = []
    if "multiples" in chosen:
        found = "; ".join(_describe(variant, sizes) for variant, sizes in chosen["multiples"].items())
        remarks.append(
            "Learning rates are those of the step law (1.79 N^−0.713 D^0.307, with D of the smallest budget) "
            f"times what the sweeps of a variant found of it, on the geometric mean: {found}."
        )
    if chosen["at_edge"]:
        remarks.append(
            f"The best learning rate of {', '.join(chosen['at_edge'])} is the lowest or highest of its "
            "sweep: a wider one (learning_rate.factors) may find better rates, and other verdicts."
        )
    return tuple(remarks)


def _choose_rates(plan: Plan) -> dict[str, Any]:
    trials: dict[tuple[str, str], list[Trial]] = {}
    for run in plan.runs:
        if run.role == "sweep":
            loss = final_loss(run) if has_finished(run.directory) else None
            trial = Trial(run.config.optimizer.learning_rate, loss)
            trials.setdefault((run.cell.variant, run.cell.size), []).append(trial)
    best = {place: find_best_rate(tried) for place, tried in trials.items()}
    law: dict[str, dict[str, float]] = {}
    for cell in plan.cells:
        tokens = wanted_tokens(plan.study, cell, plan.study.budgets.values[0])
        # By the first levels of further axes, as the sweep.
        law.setdefault(cell.variant, {}).setdefault(
            cell.size, step_law_rate(cell.parameters_without_embeddings, tokens)
        )
    rates, multiples = {}, {}
    for variant, of_law in law.items():
        own = {size: found.learning_rate for (name, size), found in best.items() if name == variant}
        rates[variant], multiples[variant] = extend_rates(own, of_law), multiples_of_law(own, of_law)
    return {"rates": rates, "multiples": multiples, "at_edge": _at_edge(best)}


def _describe(variant: str, multiples: dict[str, float]) -> str:
    sizes = ", ".join(f"{multiple:.2f} at {size}" for size, multiple in multiples.items())
    return f"{variant} × {statistics.geometric_mean(multiples.values()):.2f} ({sizes})"


def _at_edge(best: dict[tuple[str, str], BestRate]) -> list[str]:
    """Where a wider sweep might have found better rates."""
    return [f"{variant}-{size}" for (variant, size), found in best.items() if found.at_edge]
