"""Learning rates and weight decay of a study's runs: stated, from sweeps, and by the length of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from tests.scaling.study.studies import plan_of


def test_stated_rates_are_those_of_variant_and_size(tmp_path: Path) -> None:
    rates = {"mha": 2e-3, "sas": {"small": 3e-3, "large": 1e-3}}
    plan = plan_of(tmp_path, learning_rate={"rule": "stated", "rates": rates})
    found = {(run.cell.variant, run.cell.size): run.config.optimizer.learning_rate for run in plan.runs}
    assert found == {
        **{("mha", "small"): 2e-3, ("mha", "large"): 2e-3},
        **{("sas", "small"): 3e-3, ("sas", "large"): 1e-3},
    }


def test_sweep_has_its_own_sizes_budget_and_seed(tmp_path: Path) -> None:
    rule = {"rule": "sweep", "factors": [0.5, 1, 3], "sweep_sizes": ["large"]}
    rule |= {"sweep_budget": 4, "sweep_seed": 7}
    plan = plan_of(tmp_path, learning_rate=rule)
    trials = [run for run in plan.runs if run.role == "sweep"]
    assert {run.cell.name for run in trials} == {"mha-large", "sas-large"}
    assert {run.seed for run in trials} == {7}
    for run in trials:
        assert run.tokens == pytest.approx(4 * run.cell.base_parameters, abs=run.cell.step_tokens / 2)
    # Without trunks, a rate follows the step law from the budget of the sweep to that of the run.
    rates = {(variant, size): 7e-4 for variant in ("mha", "sas") for size in plan.study.sizes}
    separate = plan_of(tmp_path, learning_rate=rule, trunks="none", rates=rates)
    for run in separate.results:
        assert run.config.optimizer.learning_rate == pytest.approx(7e-4 * (run.budget / 4) ** 0.307, rel=0.02)


def test_weight_decay_follows_the_timescale_of_the_optimizer(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trunks="none", weight_decay="timescale")
    for run in plan.runs:
        optimizer, steps = run.config.optimizer, run.config.training.num_steps
        timescale = 1 / (optimizer.learning_rate * optimizer.weight_decay * steps)
        # 1.084 × 1^−0.527 and 1.084 × 2.5^−0.527, since the budgets are tokens per parameter of the base
        expected = {1: 1.084, 2.5: 0.6689}[run.budget] * (
            run.cell.parameters / run.cell.base_parameters
        ) ** 0.527
        assert timescale == pytest.approx(expected, rel=0.02)
    base = plan_of(tmp_path, trunks="none")
    assert {run.config.optimizer.weight_decay for run in base.runs} == {0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": {"rule": "stated"}},
            "rates=None: must be given if and only if rule=stated; give both",
        ),
        (
            {"learning_rate": {"rule": "stated", "rates": {"mha": 1e-3}}},
            r"rates=\['mha'\]: must have a rate for every variant; give one for each of mha, sas",
        ),
        (
            {"learning_rate": {"rule": "stated", "rates": {"mha": {"small": 1e-3}, "sas": 1e-3}}},
            r"rates\.mha=\['small'\]: must have a rate for every size; give one for each of small, large",
        ),
        (
            {"learning_rate": {"rule": "stated", "rates": {"mha": 0.0, "sas": 1e-3}}},
            r"learning_rate\.rates\.mha=0\.0: must be positive",
        ),
        (
            {"learning_rate": {"rule": "sweep", "sweep_sizes": ["huge"]}},
            r"sweep_sizes=\['huge'\]: must name sizes of the study; use some of small, large",
        ),
        ({"learning_rate": {"sweep_seed": 3}}, r"sweep_seed=3: requires rule=sweep; remove it, or"),
        ({"learning_rate": {"rule": "sweep", "sweep_seed": -1}}, "sweep_seed=-1: must be at least 0 and"),
    ],
)
def test_an_invalid_rule_is_refused_with_the_name_of_the_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, **changes)
