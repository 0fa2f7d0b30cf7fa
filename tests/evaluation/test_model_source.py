"""Errors that evaluation and generation report before they import torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.tokenizer_training import train_tokenizer
from sas_megatron.evaluation.model_source import find_model_source
from sas_megatron.evaluation.results import check_results, results_folder, write_results
from tests import small_attentions as small
from tests.evaluation.trained_runs import TrainedRun, train_and_export
from tests.small_data import SmallData


@pytest.fixture(scope="module")
def run(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_and_export(ranks, small_data, tmp_path_factory.mktemp("run"), small.SAS)


@pytest.fixture(scope="module")
def other_tokenizer(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains a tokenizer of a given size on other text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = folder / "text.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 3)

    def train(vocab_size: int) -> Path:
        path = folder / f"{vocab_size}.model"
        if not path.exists():
            train_tokenizer(stream_documents([text]), vocab_size=vocab_size, model_path=path)
        return path

    return train


def error_message(source: Path, *overrides: str, iteration: int | None = None) -> str:
    """Return the message with which `find_model_source` fails."""
    with pytest.raises(UserError) as raised:
        find_model_source(source, overrides=overrides, iteration=iteration)
    return str(raised.value)


def test_the_newest_or_the_requested_checkpoint_is_used(run: TrainedRun) -> None:
    newest, earlier = find_model_source(run.directory), find_model_source(run.directory, iteration=6)
    assert (newest.checkpoint.name, earlier.checkpoint.name) == ("iter_0000012", "iter_0000006")
    assert find_model_source(earlier.checkpoint).checkpoint == earlier.checkpoint


def test_the_layout_comes_from_the_overrides(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = find_model_source(run.directory, overrides=["parallel.tensor=2"]).config
    assert config.parallel.model_dump(exclude_defaults=True) == {"tensor": 2}
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert error_message(run.directory, "parallel.tensor=2") == (
        "world size=3: must be a multiple of 2, the number of ranks per model (parallel.tensor=2); start "
        "2 processes, or change the parallel sizes"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.context=2", "parallel.context=2: must be 1 for evaluation: a single new token cannot be"),
        ("attention.head_expansion=2", "attention.head_expansion=2: must be 3, as for the weights in"),
        ("model.vocab_size=511", "model.vocab_size=511: must be 512, as for the weights in"),
        ("data.tokenizer=nowhere.model", "data.tokenizer=nowhere.model: does not exist, and"),
        ("attention.kv_cache=both", "attention.kv_cache='both': is not one of the choices; use 'base' or"),
    ],
)
def test_overrides_that_do_not_match_the_checkpoint_are_rejected(
    run: TrainedRun, override: str, message: str
) -> None:
    assert error_message(run.directory, override).startswith(message)


def test_sequence_parallelism_is_rejected(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert error_message(run.directory, "parallel.tensor=2", "parallel.sequence=true").startswith(
        "parallel.sequence=True: must be off for evaluation, where sequences can have any length; omit it"
    )


def test_another_tokenizer_is_rejected(run: TrainedRun, other_tokenizer: Any, tmp_path: Path) -> None:
    larger, smaller = other_tokenizer(600), other_tokenizer(500)
    assert error_message(run.directory, f"data.tokenizer={larger}") == (
        f"data.tokenizer={larger}: has 600 tokens, but model.vocab_size=512; name the tokenizer of the model "
        "with data.tokenizer=PATH"
    )
    assert error_message(run.directory, f"data.tokenizer={smaller}") == (
        f"data.tokenizer={smaller}: differs from the tokenizer of the training run; name the tokenizer of "
        "the model with data.tokenizer=PATH"
    )


def test_missing_checkpoints_are_reported(run: TrainedRun, tmp_path: Path) -> None:
    assert error_message(tmp_path) == (
        f"{tmp_path}: contains no checkpoint; name a run directory, or a folder in its checkpoints/"
    )
    assert error_message(run.directory, iteration=7) == (
        f"--iteration=7: {run.directory} has no such checkpoint; use one of 6, 12"
    )


def test_results_of_different_weights_are_not_mixed(run: TrainedRun, tmp_path: Path) -> None:
    newest, earlier = find_model_source(run.directory), find_model_source(run.directory, iteration=6)
    check_results(tmp_path, newest)
    write_results(tmp_path, newest, "files", {"of": 1})
    # The checkpoint may be moved.
    moved = tmp_path / "moved" / "iter_0000012"
    shutil.copytree(newest.checkpoint, moved)
    path = write_results(tmp_path, dataclasses.replace(newest, checkpoint=moved), "tasks", {"of": 2})
    written = json.loads(path.read_text())
    assert (written["files"]["of"], written["tasks"]["of"]) == (1, 2)
    assert written["checkpoint"] == str(moved)
    with pytest.raises(FileProblem, match=r"contains results of other weights than .*iter_0000006; remove"):
        check_results(tmp_path, earlier)


def test_unwritable_results_are_reported_before_the_evaluation(run: TrainedRun, tmp_path: Path) -> None:
    source = find_model_source(run.directory)
    (tmp_path / "file").write_text("a file instead of the folder")
    with pytest.raises(FileProblem, match=r"file/iter_0000012: cannot be written \(Not a directory\); name"):
        check_results(results_folder(source, tmp_path / "file"), source)
    for text in ("{", "[]", '{"schema": 1}', '{"schema": 2}'):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(FileProblem, match=r"summary\.json: (is not a summary|has schema 1).*; remove it"):
            check_results(tmp_path, source)
