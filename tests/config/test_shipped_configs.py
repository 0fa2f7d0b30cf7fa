"""Paths that start with configs/ name shipped files outside of a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.config.errors import FileProblem
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.shipped_configs import find_config, shipped_configs

NAME = "configs/quickstart_sas.yaml"


def test_a_shipped_config_is_found_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(NAME) == shipped_configs() / "quickstart_sas.yaml"
    assert load_run_config(NAME).attention.kind == "sas"


def test_a_file_in_the_working_directory_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path(NAME)
    own.parent.mkdir()
    own.write_text("model: {}\n", encoding="utf-8")
    assert find_config(NAME) == own


@pytest.mark.parametrize(
    "name", ["configs/absent.yaml", "quickstart_sas.yaml", "runs/configs/quickstart_sas.yaml"]
)
def test_any_other_path_is_unchanged_and_reported_as_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == Path(name)
    with pytest.raises(FileProblem, match=f"^{name}: cannot be read"):
        load_run_config(name)
