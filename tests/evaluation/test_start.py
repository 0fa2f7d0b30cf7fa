"""What evaluation and generation refuse before anything heavy is started, and how they say it."""

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
from sas_megatron.evaluation.results import check_results, results_folder, write_results
from sas_megatron.evaluation.start import find_model
from tests import small_attentions as small
from tests.evaluation.trained_runs import TrainedRun, train_and_export
from tests.small_data import SmallData


@pytest.fixture(scope="module")
def run(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_and_export(ranks, small_data, tmp_path_factory.mktemp("run"), small.SAS)


@pytest.fixture(scope="module")
def other_tokenizer(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`other_tokenizer(size)`: a tokenizer of so many pieces, trained on other text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = folder / "text.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 3)

    def train(vocab_size: int) -> Path:
        path = folder / f"{vocab_size}.model"
        if not path.exists():
            train_tokenizer(stream_documents([text]), vocab_size=vocab_size, model_path=path)
        return path

    return train


def refusal(source: Path, *overrides: str, iteration: int | None = None) -> str:
    with pytest.raises(UserError) as refused:
        find_model(source, overrides=overrides, iteration=iteration)
    return str(refused.value)


def test_the_newest_checkpoint_is_taken_or_the_one_asked_for(run: TrainedRun) -> None:
    newest, earlier = find_model(run.directory), find_model(run.directory, iteration=6)
    assert (newest.checkpoint.name, earlier.checkpoint.name) == ("iter_0000012", "iter_0000006")
    assert find_model(earlier.checkpoint).checkpoint == earlier.checkpoint


def test_the_layout_is_given_anew(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = find_model(run.directory, overrides=["parallel.tensor=2"]).config
    assert config.parallel.model_dump(exclude_defaults=True) == {"tensor": 2}
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refusal(run.directory, "parallel.tensor=2") == (
        "world size=3: must be a multiple of 2, the ranks of one model (parallel.tensor=2); start 2 "
        "processes, or change the degrees"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.context=2", "parallel.context=2: must be 1 here: a new token has no sequence that ranks"),
        ("attention.head_expansion=2", "attention.head_expansion=2: is 3 of the weights in"),
        ("model.vocab_size=511", "model.vocab_size=511: is 512 of the weights in"),
        ("data.tokenizer=nowhere.model", "data.tokenizer=nowhere.model: is not there, and"),
        ("attention.kv_cache=both", "attention.kv_cache='both': is not one of the choices; use 'base' or"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(run: TrainedRun, override: str, message: str) -> None:
    assert refusal(run.directory, override).startswith(message)


def test_sequence_parallelism_is_refused(run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(run.directory, "parallel.tensor=2", "parallel.sequence=true").startswith(
        "parallel.sequence=True: must be off here: sequences are of any length; leave it out"
    )


def test_another_tokenizer_is_refused(run: TrainedRun, other_tokenizer: Any, tmp_path: Path) -> None:
    larger, smaller = other_tokenizer(600), other_tokenizer(500)
    assert refusal(run.directory, f"data.tokenizer={larger}") == (
        f"data.tokenizer={larger}: has 600 tokens, and model.vocab_size=512; name the model's own: "
        "data.tokenizer=PATH"
    )
    assert refusal(run.directory, f"data.tokenizer={smaller}") == (
        f"data.tokenizer={smaller}: is not the one that the model was trained with; name the model's own: "
        "data.tokenizer=PATH"
    )


def test_what_is_no_run_is_said_to_be_none(run: TrainedRun, tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no checkpoint; name a run's directory, or a folder in its checkpoints/"
    )
    assert refusal(run.directory, iteration=7) == (
        f"--iteration=7: {run.directory} has no checkpoint of it; use one of 6, 12"
    )


def test_results_of_other_weights_are_not_mixed(run: TrainedRun, tmp_path: Path) -> None:
    found, earlier = find_model(run.directory), find_model(run.directory, iteration=6)
    check_results(tmp_path, found)
    write_results(tmp_path, found, "files", {"of": 1})
    # Wherever the checkpoint has been moved to.
    moved = tmp_path / "moved" / "iter_0000012"
    shutil.copytree(found.checkpoint, moved)
    path = write_results(tmp_path, dataclasses.replace(found, checkpoint=moved), "tasks", {"of": 2})
    written = json.loads(path.read_text())
    assert (written["files"]["of"], written["tasks"]["of"]) == (1, 2)
    assert written["checkpoint"] == str(moved)
    with pytest.raises(FileProblem, match=r"has results of other weights than those in .*iter_0000006; take"):
        check_results(tmp_path, earlier)


def test_what_would_keep_results_from_being_written_is_found_before(run: TrainedRun, tmp_path: Path) -> None:
    found = find_model(run.directory)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileProblem, match=r"file/iter_0000012: cannot be written \(Not a directory\); name"):
        check_results(results_folder(found, tmp_path / "file"), found)
    for text in ("{", "[]", '{"schema": 1}', '{"schema": 2}'):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(FileProblem, match=r"summary\.json: (is no summary|has schema 1).*; take it away"):
            check_results(tmp_path, found)
