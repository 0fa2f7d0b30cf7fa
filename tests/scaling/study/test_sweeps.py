"""Learning rate sweeps, read from the files of their runs, and studies that are edited after a sweep."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.learning_rates import step_law_rate
from sas_megatron.scaling.study.plan import Plan, count_budget_tokens
from sas_megatron.scaling.study.run_states import read_status
from sas_megatron.scaling.study.runner import StudyRunner
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.scaling.conftest import build_tree
from tests.scaling.study.studies import SIZES, leave_run, write_study

SWEEP = {"learning_rate": {"rule": "sweep", "factors": [0.5, 1, 2]}, "variants": {"mha": {}}}


def plan_at(folder: Path, **changes: object) -> Plan:
    return plan_with_rates(*load_study(write_study(folder, **{**SWEEP, **changes})))


def leave_sweep(plan: Plan, *, best: float = 3e-4) -> None:
    """Write finished trials with the lowest loss at `best`; those at twice the rate have diverged."""
    for run in plan.runs:
        if run.role == "sweep":
            rate = run.config.optimizer.learning_rate
            if rate > 5e-4:
                leave_run(run, exit_reason=None)
            else:
                leave_run(run, loss=4 + math.log(rate / best) ** 2)


def test_diverged_trial_is_a_result_and_is_not_run_again(tmp_path: Path) -> None:
    leave_sweep(plan_at(tmp_path))
    plan = plan_at(tmp_path)
    assert all(run.is_ready for run in plan.runs)
    states = [read_status(run) for run in plan.runs if run.role == "sweep"]
    assert [status.state for status in states] == ["done", "done", "diverged"] * 2
    assert {status.remaining_steps for status in states} == {0}
    messages: list[str] = []
    runner = StudyRunner(lambda: plan, jobs=1, log=messages.append)
    assert runner.run(selected=lambda run: run.role == "sweep")
    assert messages == []


def test_table_contains_the_losses_of_a_sweep(tmp_path: Path) -> None:
    leave_sweep(plan_at(tmp_path))
    plan = plan_at(tmp_path)
    leave_run(plan.results[0])
    found = collect(plan).sweeps
    assert [(run.variant, run.size) for run in found] == [("mha", "small")] * 3 + [("mha", "large")] * 3
    for size in ("small", "large"):
        rates, losses = zip(
            *((run.learning_rate, run.loss) for run in found if run.size == size), strict=True
        )
        assert rates == pytest.approx((1.5e-4, 3e-4, 6e-4))
        assert losses == (pytest.approx(4 + math.log(2) ** 2), pytest.approx(4.0), None)


def test_table_remarks_on_rates_at_the_edge_of_a_sweep(tmp_path: Path) -> None:
    sizes = {**SIZES, "huge": {"model.num_layers": 9}}
    leave_sweep(plan_at(tmp_path, sizes=sizes), best=1e-4)
    plan = plan_at(tmp_path, sizes=sizes)
    leave_run(plan.results[0])
    remarks = collect(plan).remarks
    law = {
        cell.size: step_law_rate(cell.parameters_without_embeddings, count_budget_tokens(plan.study, cell, 1))
        for cell in plan.cells
    }
    small, large = 1.5e-4 / law["small"], 1.5e-4 / law["large"]
    assert remarks[0].endswith(
        f"mha × {math.sqrt(small * large):.2f} ({small:.2f} at small, {large:.2f} at large)."
    )
    rates = {run.cell.size: run.config.optimizer.learning_rate for run in plan.results}
    assert rates == pytest.approx({size: math.sqrt(small * large) * rate for size, rate in law.items()})
    assert remarks[1].startswith(
        "The best learning rate of mha-small, mha-large is the lowest or highest of its sweep: "
    )


def test_study_extended_after_its_sweep_is_refused(tmp_path: Path) -> None:
    leave_sweep(plan_at(tmp_path))
    plan_at(tmp_path)
    more_variants = {"variants": {"mha": {}, "gqa": {"num_kv_heads": 2}}}
    with pytest.raises(UserError, match=r"learning_rates\.json: has no learning rate for gqa at size small"):
        plan_at(tmp_path, **more_variants)
    with pytest.raises(UserError, match="has no learning rate for mha at size huge"):
        plan_at(tmp_path, sizes={**SIZES, "huge": {"model.num_layers": 9}})


def test_trials_with_other_rates_than_planned_are_refused(tmp_path: Path) -> None:
    leave_sweep(plan_at(tmp_path))
    path = write_study(tmp_path, build_tree(optimizer__learning_rate=1e-4), **SWEEP)
    with pytest.raises(FieldError, match=r"optimizer\.learning_rate=0\.00015: .* the study now plans 5e-05"):
        plan_with_rates(*load_study(path))
    assert not (tmp_path / "study" / "learning_rates.json").exists()
