"""Data, tokenizers and runs are recognized by their contents, whatever the path that names them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.token_files import load_manifest
from sas_megatron.evaluation.model_source import find_model_source
from sas_megatron.training import entry
from sas_megatron.training.run_files import RunFiles
from tests.small_data import SmallData
from tests.training.test_runs import complete, records


def run_of(source: SmallData, directory: Path, **sections: dict[str, Any]) -> RunConfig:
    return source.run(
        directory,
        training={"num_steps": 4, **sections.pop("training", {})},
        evaluation={"interval": None},
        checkpoint={"resume": True, **sections.pop("checkpoint", {})},
        **sections,
    )


def copy_data(data: SmallData, folder: Path, name: str) -> SmallData:
    """Copy token files and tokenizer to other names."""
    folder.mkdir(parents=True)
    for ending in (".bin", ".idx", ".json"):
        shutil.copyfile(f"{data.prefix}{ending}", folder / f"{name}{ending}")
    shutil.copyfile(data.tokenizer, folder / "other.model")
    return SmallData(folder / name, folder / "other.model")


@pytest.fixture(scope="module")
def stopped(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that stopped after step 2; it was started with relative paths."""
    folder = tmp_path_factory.mktemp("stopped")
    os.symlink(small_data.prefix.parent, folder / "data")
    data = SmallData(Path("data") / small_data.prefix.name, Path("data") / small_data.tokenizer.name)
    config = run_of(data, folder / "run", training={"stop_after_steps": 2})
    ranks(1).run(complete_in, folder, config)
    return folder / "run"


def complete_in(folder: Path, config: RunConfig) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        complete(config)
    finally:
        os.chdir(before)


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "spell",
    [
        lambda data, _folder: data,
        lambda data, _folder: SmallData(
            data.prefix.parent / ".." / data.prefix.parent.name / data.prefix.name, data.tokenizer
        ),
        lambda data, folder: copy_data(data, folder / "elsewhere", "renamed"),
    ],
    ids=["absolute", "dots", "copy"],
)
def test_a_run_is_resumed_with_other_paths_of_equal_data(
    small_data: SmallData, tmp_path: Path, copied: Path, spell: Callable[..., SmallData]
) -> None:
    entry.check_run(run_of(spell(small_data, tmp_path), copied), world_size=1)


def test_a_run_resumed_with_copied_data_has_the_losses_of_an_uninterrupted_run(
    ranks: Any, small_data: SmallData, tmp_path: Path, copied: Path
) -> None:
    uninterrupted = run_of(small_data, tmp_path / "uninterrupted")
    resumed = run_of(copy_data(small_data, tmp_path / "elsewhere", "renamed"), copied)
    for config in (uninterrupted, resumed):
        ranks(1).run(complete, config)
    losses = [[record["train_loss"] for record in records(config)] for config in (uninterrupted, resumed)]
    assert losses[0] == losses[1]


def test_a_run_is_not_resumed_with_other_data_or_another_order_of_them(
    small_data: SmallData, tmp_path: Path, copied: Path
) -> None:
    lines = [json.dumps({"text": f"{number} other text " * 50}) + "\n" for number in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    other = tmp_path / "other" / small_data.prefix.name
    prepare_token_files(
        [tmp_path / "text.jsonl"], tokenizer_path=small_data.tokenizer, prefix=other, num_workers=1
    )
    config = run_of(SmallData(other, small_data.tokenizer), copied)
    with pytest.raises(
        FieldError, match=r"^data\.prefixes=.*/other/text: differs from the tokens with which"
    ):
        entry.check_run(config, world_size=1)
    both = [str(small_data.prefix), str(other)]
    corpus = {prefix: load_manifest(prefix).model_dump(mode="json") for prefix in both}
    first = run_of(small_data, tmp_path / "both", data={"prefixes": both})
    RunFiles(first).open(first, {"corpus": corpus}, resumed_step=0)
    entry.check_run(first, world_size=1)
    swapped = run_of(small_data, tmp_path / "both", data={"prefixes": both[::-1]})
    with pytest.raises(
        FieldError, match=r"^data\.prefixes=.*/other/text: differs from the tokens with which"
    ):
        entry.check_run(swapped, world_size=1)
    # Without a record of their contents the paths must be equal.
    (tmp_path / "both" / "run.json").unlink()
    with pytest.raises(FieldError, match=r"^data\.prefixes=.*: was \["):
        entry.check_run(swapped, world_size=1)


def test_a_branch_starts_from_a_trunk_with_other_paths_of_equal_data(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    schedule = {"kind": "constant", "warmup_steps": 1}
    trunk = run_of(small_data, tmp_path / "trunk", schedule=schedule, training={"order_steps": 6})
    ranks(1).run(complete, trunk)
    branch = run_of(
        copy_data(small_data, tmp_path / "elsewhere", "renamed"),
        tmp_path / "branch",
        schedule={"kind": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 2},
        training={"num_steps": 6},
        checkpoint={"branch_from": str(tmp_path / "trunk" / "checkpoints" / "iter_0000004")},
    )
    entry.check_run(branch, world_size=1)


def test_a_model_is_used_with_the_tokenizer_that_its_run_keeps(
    small_data: SmallData, tmp_path: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = find_model_source(copied)
    assert source.tokenizer.location == str(copied / "tokenizer.model")
    assert source.config.data.tokenizer == str(copied / "tokenizer.model")
    assert Path(source.tokenizer.location).read_bytes() == small_data.tokenizer.read_bytes()
    # Another file at the path of the config is not used, and a path that the user names is.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / small_data.tokenizer.name).write_bytes(b"another tokenizer")
    assert find_model_source(copied).tokenizer.location == str(copied / "tokenizer.model")
    given = find_model_source(copied, overrides=[f"data.tokenizer={small_data.tokenizer}"])
    assert given.tokenizer.location == str(small_data.tokenizer)
    with pytest.raises(
        FieldError, match=r"data\.tokenizer=none\.model: does not exist, and .* no copy; name"
    ):
        find_model_source(copied, overrides=["data.tokenizer=none.model"])
    # Runs of earlier versions keep no copy.
    (copied / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        find_model_source(copied)
    done = CliRunner().invoke(cli, ["checkpoint", "export", str(copied), "--output", "model"])
    assert str(done.exception).endswith("copy it again, or train one with `sas-megatron tokenizer train`")
    options = ["--tokenizer", str(small_data.tokenizer)]
    done = CliRunner().invoke(cli, ["checkpoint", "export", str(copied), "--output", "model", *options])
    assert done.exit_code == 0, done.exception
