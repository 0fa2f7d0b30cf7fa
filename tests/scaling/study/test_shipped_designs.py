"""The shipped studies of scale have the design that docs/scale_study.md and docs/studies.md state."""

from __future__ import annotations

from collections import defaultdict

import pytest

from sas_megatron.costs.flops import causal_half, count_training_flops
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.study_file import load_study
from tests.docs.pages import ROOT, read_table
from tests.run_configs import STUDIES

HEADING = "| stage | study file | million parameters | FLOPs of a run | variants × seeds |"


@pytest.fixture(scope="module")
def stages() -> dict[str, Plan]:
    names = ("a", "b1", "b2", "b3")
    return {name: build_plan(*load_study(STUDIES / "scale" / f"{name}.yaml")) for name in names}


def test_stages_are_those_of_the_documentation(stages: dict[str, Plan]) -> None:
    rows = read_table(ROOT / "docs" / "scale_study.md", HEADING)
    for (_, file, params, flops, counts), plan in zip(rows, stages.values(), strict=True):
        study = plan.study
        assert file.strip("`") == f"configs/studies/scale/{plan.directory.name}.yaml"
        sizes = {cell.size: cell.base_parameters for cell in plan.cells}
        assert [f"{count / 1e6:.2f}" for count in sizes.values()] == params.split(", ")
        assert study.budgets.values[-1] == float(flops)
        assert f"{len(study.variants)} × {study.seeds}" == counts
        assert all(plan.hours(run) is not None for run in plan.runs)


def _spendings(run: PlannedRun) -> dict[str, float]:
    terms = count_training_flops(run.config)
    half = sum(causal_half(terms, sequence_length=run.config.data.sequence_length).values())
    return {"tokens": run.tokens, "flops": run.tokens * sum(terms.values()), "causal": run.tokens * half}


def test_runs_of_the_baseline_enclose_the_largest_budget_of_every_variant(stages: dict[str, Plan]) -> None:
    for plan in stages.values():
        baseline: dict[tuple[str, str], list[float]] = defaultdict(list)
        for run in plan.results:
            if run.cell.variant == "mha":
                for axis, amount in _spendings(run).items():
                    baseline[run.cell.size, axis].append(amount)
        for run in plan.results:
            if run.budget == plan.study.budgets.values[-1]:
                for axis, amount in _spendings(run).items():
                    known = baseline[run.cell.size, axis]
                    # Amounts within 1 % are read without interpolation.
                    assert 0.99 * min(known) <= amount <= 1.01 * max(known), (run.name, axis)


def test_every_run_has_several_times_the_steps_of_its_warm_up(stages: dict[str, Plan]) -> None:
    steps = [run.config.training.num_steps for plan in stages.values() for run in plan.results]
    largest = [
        run for plan in stages.values() for run in plan.results if run.budget == plan.study.budgets.values[-1]
    ]
    assert min(run.config.training.num_steps for run in largest) >= 200
    assert min(steps) >= 100
    assert {run.config.schedule.warmup_steps for run in largest} == {50}


def test_gpu_study_gives_every_variant_equal_seeds_and_its_own_rate_and_weight_decay() -> None:
    study, base = load_study(STUDIES / "gpu_10m_to_1b.yaml")
    rates = {(variant, size): 1e-3 for variant in study.variants for size in study.sizes}
    plan = build_plan(study, base, rates=rates)
    cells: dict[str, set[int]] = defaultdict(set)
    found: dict[tuple[str, str], set[tuple[float, float]]] = defaultdict(set)
    for run in plan.results:
        cells[f"{run.cell.name}-{run.budget:g}"].add(run.seed)
        optimizer = run.config.optimizer
        found[run.cell.variant, run.cell.size].add((optimizer.learning_rate, optimizer.weight_decay))
    assert set(map(len, cells.values())) == {3}
    assert set(map(len, found.values())) == {2}
    assert {"mha_narrow", "sas_one_block"} <= set(study.variants)
