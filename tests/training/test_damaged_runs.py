"""A run directory with damaged files is repaired from its checkpoint, or refused with the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.runs import has_finished, load_run
from sas_megatron.training import entry
from tests.small_data import SmallData
from tests.training.test_resuming import complete_and_log
from tests.training.test_runs import complete, records, summary


@pytest.fixture(scope="module")
def finished(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of four steps with two checkpoints."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    config = small_data.run(
        directory,
        training={"num_steps": 4},
        evaluation={"interval": None},
        checkpoint={"interval": 2, "resume": True},
    )
    ranks(1).run(complete, config)
    return config


@pytest.fixture
def damaged(finished: RunConfig, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that copies the run, stopped after step 2, and changes fields of the config."""
    directory = tmp_path / "run"
    shutil.copytree(finished.logging.run_directory, directory)
    shutil.rmtree(directory / "checkpoints" / "iter_0000004")
    (directory / "summary.json").unlink()
    return lambda **changes: finished.replaced(
        {"logging.run_directory": str(directory)}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )


def write(config: RunConfig, name: str, content: str | bytes | None) -> Path:
    """Replace a file of the run directory, or remove it."""
    path = Path(config.logging.run_directory) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def record_without(config: RunConfig, key: str) -> str:
    record = json.loads((Path(config.logging.run_directory) / "run.json").read_text())
    del record[key]
    return json.dumps(record)


def test_repaired_files_are_reported_and_the_run_is_resumed(
    ranks: Any, finished: RunConfig, damaged: Callable[..., RunConfig]
) -> None:
    config = damaged()
    write(config, "run.json", record_without(config, "sessions"))
    metrics = write(config, "metrics.jsonl", None)
    kept = (Path(finished.logging.run_directory) / "metrics.jsonl").read_bytes()
    invalid = (
        b'{"kind": "train", "st\xff\xfe',
        b"7",
        b"[2]",
        b"\0" * 9,
        b'{"kind": "train", "step": null}',
        b"[" * 9999,
    )
    write(config, "metrics.jsonl", kept + b"\n".join(invalid))
    write(config, "config.yaml", "model: [")
    entry.check_run(config, world_size=1)
    (lines,) = ranks(1).run(complete_and_log, config)
    directory, checkpoint = metrics.parent, metrics.parent / "checkpoints" / "iter_0000002"
    assert (
        f"{directory}/config.yaml: is damaged; it is written again, according to {checkpoint}/config.yaml"
        in lines
    )
    assert f"{directory}/run.json: has no record of earlier sessions; a new one was begun" in lines
    # Two steps and the evaluation at the end.
    assert f"{metrics}: removed 3 records after step 2, which is resumed" in lines
    assert f"{metrics}: removed 6 unreadable lines" in lines
    losses = [
        [(record["step"], record["train_loss"]) for record in records(run)] for run in (config, finished)
    ]
    assert losses[0] == losses[1]
    record = json.loads((directory / "run.json").read_text())
    assert [session["from_step"] for session in record["sessions"]] == [2]


@pytest.mark.parametrize("content", [None, "", "model: [", b"\xff\xfe", "[" * 9999])
def test_the_config_of_the_checkpoint_decides(damaged: Callable[..., RunConfig], content: Any) -> None:
    write(damaged(), "config.yaml", content)
    entry.check_run(damaged(), world_size=1)
    for field, new, previous in (("optimizer__learning_rate", 1e-4, 0.003), ("model__num_layers", 3, 2)):
        name = field.replace("__", ".")
        message = rf"^{name}={new}: was {previous} in the run to resume \(.*0000002/config\.yaml\); restore"
        with pytest.raises(FieldError, match=message):
            entry.check_run(damaged(**{field: new}), world_size=1)


def test_an_edited_config_does_not_change_the_run(damaged: Callable[..., RunConfig]) -> None:
    from sas_megatron.config.loading import dump_yaml

    edited = damaged(optimizer__learning_rate=1e-4)
    write(edited, "config.yaml", dump_yaml(edited))
    with pytest.raises(FieldError, match=r"optimizer\.learning_rate=0\.0001: was 0\.003"):
        entry.check_run(edited, world_size=1)


def test_a_missing_record_and_missing_metrics_are_reported(
    ranks: Any, damaged: Callable[..., RunConfig]
) -> None:
    config = damaged()
    for name in ("run.json", "metrics.jsonl", "config.yaml"):
        write(config, name, None)
    (lines,) = ranks(1).run(complete_and_log, config)
    text = "\n".join(lines)
    for part in (
        "config.yaml: is missing; it is written again, according to",
        "run.json: has no record of earlier sessions; a new one was begun, and the data were not compared",
        "metrics.jsonl: has no records up to step 2",
    ):
        assert part in text
    assert [record["step"] for record in records(config)] == [3, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        "[]",
        "[" * 9999,
        '{"corpus": 7}',
        '{"corpus": {"text": {"bin_sha256": "0"}}}',
        '{"corpus": {}, "sessions": {}}',
        '{"corpus": {}, "sessions": [7]}',
        '{"corpus": {}, "sessions": [{"session": "a", "host": "b", "started_at": "c"}]}',
        '{"corpus": {}, "sessions": [{"session": "a", "host": "b", "started_at": "c", "from_step": "0"}]}',
    ],
)
def test_a_damaged_record_is_refused_with_the_remedy(damaged: Callable[..., RunConfig], content: Any) -> None:
    write(damaged(), "run.json", content)
    with pytest.raises(
        FileProblem, match=r"run\.json: is damaged \(.*\); restore it from a copy, or remove it"
    ):
        entry.check_run(damaged(), world_size=1)


def test_a_folder_in_place_of_a_file_is_refused(damaged: Callable[..., RunConfig]) -> None:
    directory = Path(damaged().logging.run_directory)
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints").write_text("")
    with pytest.raises(FileProblem, match=r"checkpoints: is not a folder; remove it, or choose another"):
        entry.check_run(damaged(), world_size=1)
    (directory / "checkpoints").unlink()
    (directory / "summary.json").mkdir()
    with pytest.raises(
        FileProblem, match=r"summary\.json: is not a regular file; remove it, or choose another"
    ):
        entry.check_run(damaged(), world_size=1)


def test_a_damaged_config_of_a_run_without_checkpoints_is_refused(damaged: Callable[..., RunConfig]) -> None:
    shutil.rmtree(Path(damaged().logging.run_directory) / "checkpoints")
    for content in ("model: [", "model: {}", b"\xff"):
        write(damaged(), "config.yaml", content)
        with pytest.raises(
            FileProblem, match=r"config\.yaml: is not .*; restore it from a copy, or remove it: "
        ):
            entry.check_run(damaged(), world_size=1)
    write(damaged(), "config.yaml", None)
    entry.check_run(damaged(), world_size=1)


def test_a_truncated_summary_is_written_again(ranks: Any, finished: RunConfig, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished.logging.run_directory, directory)
    config = finished.replaced({"logging.run_directory": str(directory)})
    expected = summary(config)["final_validation_loss"]
    write(config, "summary.json", (directory / "summary.json").read_bytes()[:50])
    assert not has_finished(directory)
    ranks(1).run(complete, config)
    assert has_finished(directory)
    assert summary(config)["final_validation_loss"] == expected


def test_an_edited_config_of_a_finished_run_is_not_compared(finished: RunConfig, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished.logging.run_directory, directory)
    assert load_run(directory).config == finished
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.004"))
    with pytest.raises(
        FileProblem, match=r"config\.yaml: was changed after the run wrote it \(config_sha256"
    ):
        load_run(directory)
