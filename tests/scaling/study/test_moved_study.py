"""A study is found, and its runs are recognized, from another folder and with other paths of equal data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import dump_tree
from sas_megatron.data.token_files import load_manifest
from sas_megatron.scaling.runs import check_comparable, load_run
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.run_states import check_config
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.scaling.conftest import build_tree
from tests.scaling.study.studies import leave_run, study_tree, write_study
from tests.small_data import SmallData


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished study in `study`, whose file in `configs` names it by a relative path."""
    (tmp_path / "checkout" / "configs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout")
    path = write_study(tmp_path / "checkout" / "configs", directory="study")
    for run in plan_with_rates(*load_study(path)).runs:
        leave_run(run)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkout"


def count_states(*arguments: str | Path) -> tuple[dict[str, int], str]:
    """Return the number of runs in each state, as `study status` shows it, and its messages."""
    done = CliRunner().invoke(cli, ["study", "status", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)["counts"], done.stderr


def test_a_finished_study_is_found_from_another_folder(folder: Path, tmp_path: Path) -> None:
    path = folder / "configs" / "study.yaml"
    counts, messages = count_states(path)
    assert counts == {"done": 12}
    assert messages == f"» the directory of the study is {folder}/study\n"
    for arguments in ([path], [path, "--directory", folder / "study"]):
        done = CliRunner().invoke(cli, ["study", "collect", *map(str, arguments)])
        assert done.exit_code == 0, done.exception
        assert f"8 of 8 runs in {folder}/study/study.parquet" in done.output


def test_the_option_names_the_directory_of_a_study_that_is_not_found(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (folder / "configs").rename(moved)
    counts, messages = count_states(moved / "study.yaml")
    assert counts == {"ready": 4, "waiting": 8}
    assert messages.startswith(f"» {tmp_path}/study: does not exist; if the study has run, name its")
    assert count_states(moved / "study.yaml", "--directory", folder / "study") == ({"done": 12}, "")
    with pytest.raises(UserError, match="or name the directory of the study with --directory"):
        collect(plan_with_rates(*load_study(moved / "study.yaml")))


def leave_runs_of_data(folder: Path, small_data: SmallData) -> Any:
    """Leave a study whose runs name the small data by a path that does not exist here."""
    tree = build_tree()
    tree["data"]["prefixes"] = ["elsewhere/tokens"]
    path = write_study(folder, tree, budgets={"tokens_per_parameter": [1]})
    plan = plan_with_rates(*load_study(path))
    corpus = {"tokens": load_manifest(small_data.prefix).model_dump(mode="json")}
    for run in plan.runs:
        leave_run(run)
        record = json.loads((run.directory / "run.json").read_text()) | {"corpus": corpus}
        # The time of preparation and the sources differ as well.
        record["corpus"]["tokens"]["created"] = run.name
        (run.directory / "run.json").write_text(json.dumps(record))
    tree["data"]["prefixes"] = [str(small_data.prefix)]
    (folder / "base.yaml").write_text(dump_tree(tree))
    return path


def test_runs_with_other_paths_of_equal_data_are_those_of_the_plan(
    small_data: SmallData, tmp_path: Path
) -> None:
    plan = plan_with_rates(*load_study(leave_runs_of_data(tmp_path, small_data)))
    for run in plan.runs:
        check_config(run)
    assert [row.status for row in collect(plan).rows] == ["done"] * 4
    record = plan.runs[0].directory / "run.json"
    record.write_text(record.read_text().replace(load_manifest(small_data.prefix).bin_sha256, "0"))
    with pytest.raises(FieldError, match=r"^data\.prefixes=\['elsewhere/tokens'\]: is the value in"):
        check_config(plan.runs[0])
    with pytest.raises(UserError, match=r"data\.prefixes is \['elsewhere/tokens'\], planned"):
        collect(plan)


def test_runs_with_other_paths_of_equal_data_are_comparable(small_data: SmallData, tmp_path: Path) -> None:
    plan = plan_with_rates(*load_study(leave_runs_of_data(tmp_path, small_data)))
    first, second = plan.runs[0], next(run for run in plan.runs if run.cell.size != plan.runs[0].cell.size)
    config = (first.directory / "config.yaml").read_text().replace("elsewhere/tokens", "here/renamed")
    (second.directory / "config.yaml").write_text(config)
    runs = [load_run(run.directory) for run in (first, second)]
    check_comparable(runs)
    record = second.directory / "run.json"
    record.write_text(record.read_text().replace(load_manifest(small_data.prefix).tokenizer_sha256, "0"))
    with pytest.raises(UserError, match=r"data\.prefixes: .*elsewhere/tokens.*here/renamed"):
        check_comparable([runs[0], load_run(second.directory)])
    assert study_tree(tmp_path)["directory"] == str(plan.directory)
