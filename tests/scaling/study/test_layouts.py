"""Parallel layouts of a study, found by the search over estimates."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.loading import dump_tree
from sas_megatron.planning import layout_search
from sas_megatron.scaling.study.layouts import read_layouts
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.fork_server import fork_context
from tests.planning.toy_machines import toy_machine
from tests.scaling.conftest import build_tree
from tests.scaling.study.studies import write_study

TOY = toy_machine(memory_gib=4.0, link_gigabytes_per_second=1000.0)


def test_plan_uses_the_layouts_of_a_search_and_their_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = fork_context()
    monkeypatch.setattr(layout_search.multiprocessing, "get_context", lambda _method: context)
    # Which layouts a search tries is tested in tests/planning.
    monkeypatch.setattr(layout_search, "MAX_FITTING_FAMILIES", 1)
    monkeypatch.setattr(layout_search.os, "cpu_count", lambda: 1)
    base = build_tree(training__global_batch_size=4, training__micro_batch_size=4, data__sequence_length=48)
    sizes = {"small": {"model.hidden_size": 24, "attention.num_heads": 4}}
    path = write_study(
        tmp_path, base, sizes=sizes, variants={"mha": {}}, machine={"processes": 2, "price_per_hour": 3.0}
    )
    (tmp_path / "toy.yaml").write_text(dump_tree(TOY.model_dump(mode="json")))
    found = CliRunner().invoke(cli, ["study", "layout", str(path), "--hardware", str(tmp_path / "toy.yaml")])
    assert found.exit_code == 0, found.output
    study, tree = load_study(path)
    layout = read_layouts(study)["mha-small"]
    plan = plan_with_rates(study, tree)
    for run in plan.runs:
        assert run.config.check_world_size(2) == 2 // run.config.parallel.model_size
        assert run.config.parallel.tensor == layout.changes["parallel.tensor"]
        hours = plan.hours(run)
        assert hours == pytest.approx(run.trained_steps * layout.step_seconds * 2 / 3600)
        assert plan.price(run) == pytest.approx(3 * (hours or 0))
    shown = CliRunner().invoke(cli, ["study", "plan", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "hours of one rank by estimated step times, price" in shown.output
    # Nothing else has changed, and a plan without the record has no layouts.
    before = build_plan(study, tree)
    assert before.hours(before.runs[0]) is None
    assert [run.tokens for run in plan.runs] == [run.tokens for run in before.runs]
    assert {run.config.training.micro_batch_size for run in before.runs} == {4}
    assert f"mha-small: {' '.join(found.output.split(': ')[1].split(',')[0].split())}" in found.output


def test_study_that_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    base = build_tree(training__global_batch_size=8, training__micro_batch_size=8, data__sequence_length=48)
    path = write_study(tmp_path, base, variants={"mha": {}})
    tiny = TOY.model_copy(update={"memory_gib": 1e-4})
    (tmp_path / "tiny.yaml").write_text(dump_tree(tiny.model_dump(mode="json")))
    refused = CliRunner().invoke(
        cli, ["study", "layout", str(path), "--hardware", str(tmp_path / "tiny.yaml")]
    )
    assert "no layout of mha-small fits into the memory of" in str(refused.exception)
    assert not (tmp_path / "study").exists()
