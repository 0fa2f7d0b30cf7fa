"""Damaged records in a study's directory are refused by name, with the way to replace them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import dump_tree, read_yaml
from sas_megatron.scaling.study.step_times import read_step_times
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.submission import read_jobs
from sas_megatron.scaling.study.sweeps import list_sweep_remarks, plan_with_rates
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "scaling" / "fixtures" / "study"
REMEDIES = {
    "layouts.json": "run `sas-megatron study layout` again, or remove it",
    "learning_rates.json": "restore it from a copy, or remove it to determine the rates",
    "step_seconds.json": "run `sas-megatron study time` again, or remove it",
    "jobs.json": "restore it from a copy, or remove it if no job of the study is queued",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_all(folder: Path) -> None:
    study, base = load_study(folder / "study.yaml")
    plan = plan_with_rates(study, base)
    list_sweep_remarks(study)
    read_step_times(plan)
    read_jobs(plan)


def test_undamaged_records_are_read(folder: Path) -> None:
    read_all(folder)


@pytest.mark.parametrize("name", REMEDIES)
def test_a_damaged_record_is_refused_with_its_remedy(folder: Path, name: str) -> None:
    path = folder / "study" / name
    content = path.read_bytes()
    damages: list[bytes] = [b"", content[:-9], b"\xff" + content, b"[]", b"null", b"[" * 100_000]
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(FileProblem) as caught:
            read_all(folder)
        assert str(caught.value).startswith(f"study/{name}: is damaged ("), damaged[:20]
        assert REMEDIES[name] in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileProblem, match=rf"^study/{name}: is damaged \(Not a regular file\); "):
        read_all(folder)


def edited(tree: Any, keys: tuple[str, ...], value: Any) -> Any:
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("name", "keys", "value", "where"),
    [
        ("learning_rates.json", ("rates",), 64, "rates: "),
        ("learning_rates.json", ("rates", "mha"), [0.1], "rates.mha: "),
        ("learning_rates.json", ("rates", "mha", "small"), "0.1", "rates.mha.small: "),
        ("learning_rates.json", ("rates", "mha", "small"), -1.0, "rates.mha.small: "),
        ("learning_rates.json", ("multiples", "sas"), {}, "multiples.sas: "),
        ("learning_rates.json", ("at_edge",), None, "at_edge: "),
        ("layouts.json", ("layouts", "mha-small"), 1, "layouts.mha-small: "),
        ("layouts.json", ("layouts", "mha-small", "step_seconds"), None, "layouts.mha-small.step_seconds: "),
        ("step_seconds.json", ("cells", "mha-small", "step_seconds"), [], "cells.mha-small.step_seconds: "),
        ("step_seconds.json", ("machine",), "cpu", "machine: "),
        ("jobs.json", ("mha-small-3200-s1234",), {"number": 12}, "mha-small-3200-s1234.number: "),
    ],
)
def test_a_wrong_value_of_a_record_is_named(
    folder: Path, name: str, keys: tuple[str, ...], value: Any, where: str
) -> None:
    path = folder / "study" / name
    path.write_text(json.dumps(edited(json.loads(path.read_text()), keys, value)))
    with pytest.raises(FileProblem) as caught:
        read_all(folder)
    assert str(caught.value).startswith(f"study/{name}: is damaged ({where}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.tensor": [2]}, r"parallel.tensor=\[2\]: input should be a valid integer; correct it"),
        ({"ranks.tensor": 2}, r"ranks.tensor=2: is no field of a section; use one of model, attention"),
        (
            {"parallel.tensors": 2},
            r"parallel.tensors=2: extra inputs are not permitted; correct it, or remove",
        ),
    ],
)
def test_a_recorded_layout_with_invalid_fields_names_the_field(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    path = folder / "study" / "layouts.json"
    record = edited(json.loads(path.read_text()), ("layouts", "mha-small", "changes"), changes)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        read_all(folder)


@pytest.mark.parametrize("section", [None, 1, "text", [1]])
def test_a_size_cannot_change_a_section_that_is_no_mapping(folder: Path, section: Any) -> None:
    base = read_yaml(folder / "base.yaml")
    (folder / "base.yaml").write_text(dump_tree({**base, "model": section}))
    with pytest.raises(UserError, match=r"variants.mha, sizes.small: model is a value, not a section"):
        read_all(folder)


def test_token_files_with_a_name_too_long_for_a_file_system_are_not_on_this_machine(folder: Path) -> None:
    from sas_megatron.scaling.study.plan_data import has_token_files

    study, base = load_study(folder / "study.yaml")
    run = plan_with_rates(study, base).runs[0]
    data = run.config.data.model_copy(update={"prefixes": ["n" * 300]})
    assert not has_token_files(data)
    with pytest.raises(FieldError, match=r"no.field=1: is no field"):
        run.config.replaced({"no.field": 1})
