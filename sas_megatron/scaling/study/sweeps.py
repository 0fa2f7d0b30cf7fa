"""What a study's sweep found, once all its runs have finished; then it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sas_megatron.data.writing import write_file
from sas_megatron.scaling.study.layouts import read_layouts
from sas_megatron.scaling.study.learning_rates import BestRate, Trial, extend_rates, find_best_rate
from sas_megatron.scaling.study.plan import Plan, build_plan
from sas_megatron.scaling.study.run_states import final_loss, has_diverged, is_done
from sas_megatron.scaling.study.study_file import Study

RECORD = "learning_rates.json"


def plan_with_rates(study: Study, base: dict[str, Any]) -> Plan:
    """The plan as far as the sweep has come: with its rates where it has been run to its end.

    They are written down then, so that the runs after it never change.

    Raises:
        UserError: as `build_plan`, or every run of a sweep diverged.
    """
    layouts = read_layouts(study)
    plan = build_plan(study, base, layouts=layouts)
    if study.learning_rate.rule != "sweep":
        return plan
    record = Path(study.directory) / RECORD
    if not record.exists():
        trials = [run for run in plan.runs if run.role == "sweep"]
        if not all(is_done(run) or has_diverged(run) for run in trials):
            return plan
        write_file(record, json.dumps(_choose_rates(plan), indent=2) + "\n")
    chosen = json.loads(record.read_text(encoding="utf-8"))
    rates = {
        (variant, size): rate for variant, sizes in chosen["rates"].items() for size, rate in sizes.items()
    }
    return build_plan(study, base, rates=rates, layouts=layouts)


def _choose_rates(plan: Plan) -> dict[str, Any]:
    trials: dict[tuple[str, str], list[Trial]] = {}
    for run in plan.runs:
        if run.role == "sweep":
            loss = final_loss(run) if is_done(run) else None
            trial = Trial(run.config.optimizer.learning_rate, loss)
            trials.setdefault((run.cell.variant, run.cell.size), []).append(trial)
    best = {place: find_best_rate(tried) for place, tried in trials.items()}
    parameters = {(cell.variant, cell.size): cell.parameters for cell in plan.cells}
    rates = {
        variant: extend_rates(
            {size: found.learning_rate for (name, size), found in best.items() if name == variant},
            {size: count for (name, size), count in parameters.items() if name == variant},
        )
        for variant in plan.study.variants
    }
    return {"rates": rates, "at_edge": _at_edge(best)}


def _at_edge(best: dict[tuple[str, str], BestRate]) -> list[str]:
    """Where a wider sweep might have found better rates."""
    return [f"{variant}-{size}" for (variant, size), found in best.items() if found.at_edge]
