"""Errors of the file system are reported with the file of the run that they concern."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.config.errors import FileProblem
from sas_megatron.training.resuming import KeptRecords
from sas_megatron.training.run_files import RunFiles
from tests.full_disk import no_file_longer_than
from tests.run_configs import small_config


def test_a_full_disk_is_reported_with_the_file_that_is_written(tmp_path: Path) -> None:
    config = small_config(logging={"run_directory": str(tmp_path / "run"), "tensorboard": False})
    files = RunFiles(config)
    with no_file_longer_than(100), pytest.raises(FileProblem, match=rf"^{tmp_path}/run: cannot be .*large\)"):
        files.open(config, {}, resumed_step=0)
    files.open(config, {}, resumed_step=0)
    with no_file_longer_than(100):
        with pytest.raises(FileProblem, match=r"metrics\.jsonl: cannot be .*\(File too large\); free disk"):
            files.write_record({"kind": "train", "losses": list(range(50))})
        with pytest.raises(FileProblem, match=r"summary\.json: cannot be "):
            files.write_summary({"steps": list(range(50))})
        files.close()  # fails as well, but the error has been reported


def test_a_run_directory_that_vanishes_is_reported(tmp_path: Path) -> None:
    config = small_config(logging={"run_directory": str(tmp_path / "run"), "tensorboard": False})
    files = RunFiles(config)
    files.open(config, {}, resumed_step=0)
    files.check_session()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(FileProblem, match=r"run\.json: cannot be read or written \(No such file"):
        files.check_session()


def test_a_damaged_run_json_is_reported_before_the_run_is_resumed(tmp_path: Path) -> None:
    config = small_config(
        logging={"run_directory": str(tmp_path), "tensorboard": False}, checkpoint={"resume": True}
    )
    RunFiles(config).open(config, {"corpus": {}}, resumed_step=0)
    for text in ('{"sessions": [', "[]", '{"corpus": {"text": {}}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(FileProblem, match=r"run\.json: is damaged \(.*\); restore it from a copy, or"):
            RunFiles.check_directory(config)


def test_run_json_of_a_later_version_is_refused(tmp_path: Path) -> None:
    config = small_config(
        logging={"run_directory": str(tmp_path), "tensorboard": False}, checkpoint={"resume": True}
    )
    RunFiles(config).open(config, {"corpus": {}}, resumed_step=0)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    assert record["schema"] == record["sessions"][-1]["schema"] == 2
    path.write_text(json.dumps({**record, "schema": 3}))
    with pytest.raises(FileProblem, match=r"run\.json: has schema 3, newer than 2; update the package"):
        RunFiles.check_directory(config)


def tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("lm loss")]


def write_steps(directory: Path, steps: range, *, resumed_step: int, branch: Any = None) -> None:
    config = small_config(logging={"run_directory": str(directory), "tensorboard": True})
    files = RunFiles(config)
    files.open(config, {}, resumed_step=resumed_step, branch=branch)
    for step in steps:
        files.write_record({"kind": "train", "step": step, "train_loss": 1.0 / step})
    files.close()


@pytest.mark.parametrize("resumed_step", [0, 1, 3])
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path, resumed_step: int) -> None:
    write_steps(tmp_path, range(1, 5), resumed_step=0)
    write_steps(tmp_path, range(resumed_step + 1, 7), resumed_step=resumed_step)
    assert tensorboard_steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_tensorboard_of_a_branch_starts_with_the_steps_of_its_trunk(tmp_path: Path) -> None:
    write_steps(tmp_path / "trunk", range(1, 5), resumed_step=0)
    lines = (tmp_path / "trunk" / "metrics.jsonl").read_text().splitlines()[:3]
    branch = SimpleNamespace(read_metrics=lambda _config: KeptRecords(lines))
    write_steps(tmp_path / "branch", range(4, 6), resumed_step=3, branch=branch)
    assert tensorboard_steps(tmp_path / "branch") == [1, 2, 3, 4, 5]
    records = (tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2, 3, 4, 5]
