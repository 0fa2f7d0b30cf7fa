"""Plans of studies: runs, configs, costs, and their table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.config.evaluation import EvaluationConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters, without_embeddings
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.study_file import load_study
from tests.run_configs import STUDIES
from tests.scaling.study.studies import plan_of, write_study

SHIPPED = sorted(STUDIES.rglob("*.yaml"))


def test_branches_share_a_trunk_and_have_the_steps_of_their_budget(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds={"mha": 2, "sas": 1})
    assert len(plan.cells) == 4
    assert [run.name for run in plan.runs if run.cell.size == "small"] == [
        *("mha-small-trunk-s1234", "mha-small-1-s1234", "mha-small-2.5-s1234"),
        *("mha-small-trunk-s1235", "mha-small-1-s1235", "mha-small-2.5-s1235"),
        *("sas-small-trunk-s1234", "sas-small-1-s1234", "sas-small-2.5-s1234"),
    ]
    by_name = {run.name: run for run in plan.runs}
    for run in plan.results:
        training, schedule = run.config.training, run.config.schedule
        base_parameters = sum(count_parameters(by_name[f"mha-{run.cell.size}-1-s1234"].config).values())
        assert run.tokens == pytest.approx(run.budget * base_parameters, abs=run.cell.step_tokens / 2)
        assert schedule.kind == "warmup_stable_decay"
        assert schedule.decay_steps == round(0.2 * training.num_steps)
        trunk = by_name[run.trunk or ""]
        branch_point = training.num_steps - schedule.decay_steps
        assert run.trained_steps == schedule.decay_steps
        assert run.trunk_steps == branch_point
        assert branch_point in (trunk.config.checkpoint.at_steps or [])
        assert run.config.checkpoint.branch_from == f"{trunk.directory}/checkpoints/iter_{branch_point:07d}"
        assert trunk.config.schedule.kind == "constant"
        assert trunk.config.training.num_ordered_samples == training.num_ordered_samples
        assert trunk.seed == run.seed
    # The steps of the trunk and of each branch are counted once.
    of_cell = [run for run in plan.runs if run.name.startswith("mha-small") and run.seed == 1234]
    flops = sum(count_training_flops(of_cell[0].config).values())
    trunk, short, long = of_cell
    assert sum(run.trained_flops for run in of_cell) == flops * 7 * 51 * (
        trunk.config.training.num_steps + short.trained_steps + long.trained_steps
    )
    assert trunk.trained_steps + long.trained_steps == long.config.training.num_steps


def test_runs_without_trunks_have_the_schedule_of_the_base(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trunks="none", budgets={"tokens": [5_000, 20_000]})
    assert {run.role for run in plan.runs} == {"run"}
    assert {run.config.schedule.kind for run in plan.runs} == {"cosine"}
    assert {run.tokens for run in plan.runs} == {14 * 357, 56 * 357}
    assert all(run.trained_steps == run.config.training.num_steps for run in plan.runs)


def test_runs_measure_what_happens_inside_their_models_unless_the_study_says_otherwise(
    tmp_path: Path,
) -> None:
    def numbers(**fields: Any) -> set[int]:
        sizes = {"small": {f"evaluation.{name}": value for name, value in fields.items()}}
        return {run.config.evaluation.probe_sequences for run in plan_of(tmp_path, sizes=sizes).runs}

    assert numbers() == {2}
    assert numbers(num_sequences=1) == {1}
    assert numbers(probe_sequences=0) == {0}
    assert EvaluationConfig().probe_sequences == 0, "other runs measure nothing by default"


def test_a_variant_may_multiply_fields_of_each_size(tmp_path: Path) -> None:
    variants = {"mha": {}, "wide": {"kind": "mha", "times": {"num_heads": 0.5, "head_dim": 2}}}
    plan = plan_of(tmp_path, variants=variants)
    for size in plan.study.sizes:
        base, wide = (
            next(cell for cell in plan.cells if (cell.variant, cell.size) == (variant, size))
            for variant in variants
        )
        attention = wide.config.attention
        assert 2 * attention.num_heads == base.config.attention.num_heads
        assert attention.head_dim == 2 * base.config.attention.head_dim
        assert wide.parameters == base.parameters
    with pytest.raises(
        UserError,
        match=r"^variants.thirds, .*: times.head_dim=0.3: must be a number whose product with "
        r"attention.head_dim=\d+ is an integer; use another factor, or a base in which",
    ):
        plan_of(tmp_path, variants={"mha": {}, "thirds": {"kind": "mha", "times": {"head_dim": 0.3}}})
    with pytest.raises(UserError, match=r"times.rotary=2: must be a number whose product with attention.r"):
        plan_of(tmp_path, variants={"mha": {}, "after": {"kind": "mha", "times": {"rotary": 2}}})


def test_flop_budgets_determine_the_tokens_of_each_variant(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trunks="none", budgets={"flops": [4e11, 1e12]})
    tokens = {run.name: run.tokens for run in plan.runs}
    assert tokens["sas-small-4e+11-s1234"] < 0.9 * tokens["mha-small-4e+11-s1234"]
    for run in plan.runs:
        assert run.trained_flops == pytest.approx(run.budget, rel=0.03)


def test_variants_are_matched_to_the_base_of_their_size(tmp_path: Path) -> None:
    variants = {"sas": {"head_expansion": 2, "simulated_head_dim": 8}, "mha": {}, "gqa": {"num_kv_heads": 2}}
    plan = plan_of(tmp_path, match="params", variants=variants, tolerance=0.02)
    counts = {cell.name: cell.parameters for cell in plan.cells}
    by_name = {cell.name: cell.config for cell in plan.cells}
    for name in ("sas-small", "gqa-small"):
        assert by_name[name].model.ffn_hidden_size != by_name["mha-small"].model.ffn_hidden_size
        assert counts[name] == pytest.approx(counts["mha-small"], rel=0.02)
    (gqa,) = [cell for cell in plan.cells if cell.name == "gqa-large"]
    assert gqa.config.attention.num_key_value_heads == 2
    assert gqa.config.model.num_layers == 4


def test_axes_apply_to_variants_that_have_their_fields(tmp_path: Path) -> None:
    axes = {
        "kernel": {"k1": {"attention.kernel_size": 1}, "k3": {"attention.kernel_size": 3}},
        "length": {
            "512": {"data.sequence_length": 512, "training.global_batch_size": 2},
            "1024": {"data.sequence_length": 1024, "training.global_batch_size": 1},
        },
    }
    base_sizes = {"small": {"model.hidden_size": 24, "training.micro_batch_size": 1}}
    plan = plan_of(tmp_path, axes=axes, sizes=base_sizes)
    assert [cell.name for cell in plan.cells] == [
        *("mha-small-512", "mha-small-1024"),
        *("sas-small-k1-512", "sas-small-k1-1024", "sas-small-k3-512", "sas-small-k3-1024"),
    ]
    by_name = {cell.name: cell.config for cell in plan.cells}
    assert by_name["sas-small-k1-1024"].attention.kernel_size == 1  # type: ignore[attr-defined]
    assert {cell.step_tokens for cell in plan.cells} == {1024}


def test_learning_rates_follow_the_published_rules(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, learning_rate={"rule": "kaplan"})
    run = plan.runs[0]
    count = sum(without_embeddings(count_parameters(run.config)).values())
    assert count == 3 * (4 * 24 * 24 + 3 * 24 * 104 + 2 * 24) + 24
    # ln(29,544) = 10.29363
    assert run.config.optimizer.learning_rate == pytest.approx(0.003239 - 0.0001395 * 10.29363, rel=1e-5)
    plan = plan_of(
        tmp_path, learning_rate={"rule": "step_law", "batch": "step_law"}, budgets={"tokens": [9_000, 90_000]}
    )
    run = plan.runs[1]
    # 0.58 × 90,000^0.571 = 391.4 tokens: 7.67 samples of 51, and the base's micro batch is 7.
    assert run.config.training.global_batch_size == 7
    assert run.config.optimizer.learning_rate == pytest.approx(
        1.79 * 29_544**-0.713 * (252 * 357) ** 0.307, rel=1e-6
    )
    # All branches have the learning rate of their trunk.
    assert len({r.config.optimizer.learning_rate for r in plan.runs if r.cell == run.cell}) == 1


def test_only_sweep_runs_are_ready_before_the_sweep_has_finished(tmp_path: Path) -> None:
    sweep = {"rule": "sweep", "factors": [0.5, 1, 3]}
    sizes = {
        "tiny": {"model.hidden_size": 12},
        "small": {"model.hidden_size": 24},
        "large": {"model.num_layers": 4},
    }
    plan = plan_of(tmp_path, learning_rate=sweep, sizes=sizes)
    assert {run.role for run in plan.runs if run.is_ready} == {"sweep"}
    trials = [run for run in plan.runs if run.role == "sweep"]
    assert [run.name for run in trials[:3]] == [f"mha-tiny-sweep-x{x}" for x in ("0.5", "1", "3")]
    assert {run.cell.size for run in trials} == {"tiny", "small"}
    assert [run.config.optimizer.learning_rate for run in trials[:3]] == pytest.approx([1.5e-4, 3e-4, 9e-4])
    assert all(run not in plan.results for run in trials)
    rates = {(variant, size): 7e-4 for variant in ("mha", "sas") for size in sizes}
    after = plan_of(tmp_path, learning_rate=sweep, sizes=sizes, rates=rates)
    assert all(run.is_ready for run in after.runs)
    assert {run.config.optimizer.learning_rate for run in after.results} == {7e-4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": {"tokens": [5], "flops": [1.0]}}, "must hold exactly one of tokens"),
        ({"budgets": {"tokens": [50, 5]}}, "must be positive numbers in ascending order"),
        (
            {"seeds": {"mha": 2}},
            r"study\.seeds=.*must be a positive number for every variant; give one for each of mha, sas",
        ),
        ({"wariants": {}}, "wariants: extra inputs are not permitted; known: base, directory, variants"),
        ({"variants": {"m-a": {}}}, r"study=m-a: becomes part of file names; use letters"),
        ({"variants": {"mah": {}}}, r"attention\.kind=mah: is not a known variant"),
        (
            {"sizes": {"a": {"hidden_size": 24}}},
            r"variants\.mha, sizes\.a: hidden_size=24: must have the form section",
        ),
        ({"sizes": {"a": {"model.hiden_size": 24}}}, r"did you mean model\.hidden_size\?"),
        (
            {"match": "params", "tolerance": 1e-6},
            r"variants\.sas, sizes\.small: .*the nearest match in params",
        ),
        (
            {"learning_rate": {"rule": "sweep"}, "sizes": {"a": {}}},
            "needs two sizes, since it sweeps the two smallest",
        ),
        ({"budgets": {"tokens": [1_000_000, 1_000_001]}}, "2 runs of the study are named"),
        (
            {"withdrawn": {"mha": "It started wrongly."}},
            "withdrawn=mha: is not a variant other than the baseline; name one of sas",
        ),
    ],
)
def test_invalid_study_is_refused_with_the_name_of_the_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, **changes)


def test_plan_command_prints_runs_costs_and_detectable_differences(tmp_path: Path) -> None:
    machine = {"teraflops": 0.5, "price_per_hour": 2.0}
    path = write_study(tmp_path, machine=machine, seed_noise=0.01, seeds={"mha": 3, "sas": 3})
    shown = CliRunner().invoke(cli, ["study", "plan", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    planned = json.loads(shown.output)
    assert len(planned["runs"]) == 36
    totals = planned["totals"]
    assert totals["hours"] == pytest.approx(totals["flops"] / 0.5e12 / 3600)
    assert totals["price"] == pytest.approx(2 * totals["hours"])
    assert totals["flops"] < totals["flops_without_trunks"]
    # (1.95996 + 0.84162) × 0.01 × √(2/3), and 1/√2 of it over 2 sizes; budgets of one trunk are correlated.
    assert planned["smallest_effects"]["sas"] == pytest.approx([0.022875, 0.022875], rel=1e-4)
    table = CliRunner().invoke(cli, ["study", "plan", str(path)]).output
    assert "sas-large-2.5-s1236" in table
    assert "36 runs, of which 24 are compared" in table
    # On a narrow terminal the numbers are below the name; no number is split.
    narrow = CliRunner().invoke(cli, ["study", "plan", str(path)], env={"COLUMNS": "40"}).output.splitlines()
    starts = [number for number, line in enumerate(narrow) if line.startswith(("mha-", "sas-"))][:36]
    assert {len(narrow[number].split()) for number in starts} == {1}
    numbers = [narrow[number + 1].split() for number in starts]
    assert {len([word for word in line if word not in ("k", "M")]) for line in numbers} == {9}
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("columns", [80, 200])
def test_plan_table_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    machine = {"teraflops": 0.5, "price_per_hour": 2000.0}
    variants = {"multi_head_attention": {"kind": "mha"}, "simulated_attention": {"kind": "sas"}}
    path = write_study(tmp_path, machine=machine, variants=variants)
    shown = CliRunner().invoke(cli, ["study", "plan", str(path)], env={"COLUMNS": str(columns)}).output
    table = shown.splitlines()[: -1 if columns == 80 else None]
    rows = [line for line in table if "runs, " not in line and "detectable" not in line]
    assert max(map(len, rows)) <= columns
    assert any(line.startswith("multi_head_attention-small-trunk-s1234") for line in rows)
    # Every column has its heading and every run its price.
    assert all(name in shown for name in ("steps", "params", "tokens", "FLOPs", "lr", "hours", "price"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_study_has_a_plan(path: Path) -> None:
    plan = build_plan(*load_study(path))
    assert len(plan.results) > len(plan.study.variants)
    assert len({run.directory for run in plan.runs}) == len(plan.runs)


def test_thousand_runs_are_planned_within_five_seconds_without_torch(tmp_path: Path) -> None:
    sizes = {f"s{layers}": {"model.num_layers": layers} for layers in range(1, 21)}
    budgets = {"tokens_per_parameter": [2, 4, 8, 16]}
    path = write_study(tmp_path, sizes=sizes, budgets=budgets, seeds=5, match="params", tolerance=0.05)
    program = f"""
import sys, time
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.study_file import load_study
started = time.process_time()
plan = build_plan(*load_study({str(path)!r}))
print(len(plan.runs), time.process_time() - started, "torch" in sys.modules)
"""
    started = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    count, seconds, has_torch = output.split()
    assert int(count) == 1_000
    assert has_torch == "False"
    assert float(seconds) < 5, (
        f"{seconds} s of processor time, {time.perf_counter() - started:.1f} s in total"
    )


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"seeds": 10**9}, "8,000,000,000"),
        ({"seeds": {"mha": 1, "sas": 2000}}, "8,004"),
        (
            {"axes": {f"a{axis}": {f"l{axis}{level}": {} for level in range(9)} for axis in range(9)}},
            "3,099,363,912",
        ),
    ],
)
@pytest.mark.timeout(20)
def test_a_study_of_too_many_runs_is_refused_before_they_are_planned(
    tmp_path: Path, changes: dict[str, Any], count: str
) -> None:
    with pytest.raises(
        UserError, match=rf"study={count} runs: must have at most 3,000, as the product of sizes"
    ):
        load_study(write_study(tmp_path, **changes))


def test_a_directory_with_a_name_too_long_for_a_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study.directory=n+: has a name of more than 230 bytes"):
        load_study(write_study(tmp_path, directory="n" * 300))
