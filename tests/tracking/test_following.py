"""Trackers of runs that train: same id after a requeue, and no effect of a tracker that is not reached."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.tracking.follower import Follower
from tests.fork_server import run_command
from tests.run_configs import small_config
from tests.scaling.conftest import build_tree
from tests.scaling.study.studies import write_study
from tests.selection import exhaustive
from tests.small_data import SmallData
from tests.tracking.tracked_runs import read_offline_parts, steps_in_database, steps_in_parts


def write_config(small_data: SmallData, folder: Path, trackers: list[str]) -> Path:
    config = small_data.run(
        folder / "run",
        training={"num_steps": 6},
        evaluation={"num_sequences": 4, "interval": 2},
        logging={"trackers": trackers},
    )
    path = folder / "run.yaml"
    path.write_text(dump_yaml(config))
    return path


@exhaustive
def test_a_run_that_is_requeued_is_one_run_of_each_tracker(
    small_data: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    command = (
        "train",
        write_config(small_data, tmp_path, ["tensorboard", "wandb", "mlflow"]),
        "checkpoint.resume=auto",
    )
    for step in (3, 6):
        done = run_command(*command, f"training.stop_after_steps={step}")
        assert done.returncode == 0, done.stderr
    # What a slow machine has not sent at the end of a run, a later command sends.
    done = run_command("runs", "sync", tmp_path / "run")
    deadline = time.monotonic() + 120
    while "another process" in done.stdout and time.monotonic() < deadline:
        time.sleep(2)
        done = run_command("runs", "sync", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["sessions"]) == 2
    expected = {"lm loss": [1, 2, 3, 4, 5, 6], "lm loss validation": [2, 3, 4, 6]}
    assert steps_in_parts(tmp_path / "run") == expected
    runs = [found.run for found in read_offline_parts(tmp_path / "run") if found.HasField("run")]
    assert {found.run_id for found in runs} == {record["run_id"]}
    steps = steps_in_database(tmp_path / "runs.db")
    assert {tag: steps[tag] for tag in expected} == expected


def test_a_tracker_that_is_not_reached_neither_stops_nor_slows_a_run(
    small_data: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that follows the run fails at once here; a server without an answer keeps it waiting."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    path = write_config(small_data, tmp_path, ["mlflow"])
    done = run_command("train", path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "finished"
    assert (
        "trackers: mlflow has not received 6 steps yet; send them later with: sas-megatron runs sync"
        in done.stdout
    )
    assert (tmp_path / "run" / "trackers" / "log.txt").exists()


def test_a_process_that_cannot_be_started_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("subprocess.Popen", refuse)
    follower = Follower(small_config(logging={"run_directory": str(tmp_path), "trackers": ["wandb"]}))
    (line,) = follower.start()
    assert line.startswith("trackers: cannot be started (Cannot allocate memory); send them later with: sas-")
    assert follower.finish() == []
    without = Follower(small_config(logging={"run_directory": str(tmp_path), "trackers": ["tensorboard"]}))
    assert without.start() == without.finish() == []


@pytest.mark.parametrize(
    ("logging", "trackers"),
    [({}, ["tensorboard"]), ({"tensorboard": False}, []), ({"tensorboard": True}, ["tensorboard"])],
)
def test_the_former_field_of_tensorboard_is_read(logging: dict[str, bool], trackers: list[str]) -> None:
    config = small_config(logging={"run_directory": "run", **logging})
    assert config.logging.trackers == trackers
    assert "tensorboard:" not in dump_yaml(config)


def test_contradictory_trackers_are_refused() -> None:
    with pytest.raises(
        FieldError, match=r"logging.tensorboard=False: has been replaced by logging.trackers, which"
    ):
        small_config(logging={"trackers": ["tensorboard", "wandb"], "tensorboard": False})
    with pytest.raises(FieldError, match=r"logging.trackers=\['wandb', 'wandb'\]: names a tracker twice"):
        small_config(logging={"trackers": ["wandb", "wandb"]})


@pytest.mark.parametrize("trackers", [["tensorboard"], ["tensorboard", "wandb"]])
def test_runs_of_a_study_have_its_group_and_tags(tmp_path: Path, trackers: list[str]) -> None:
    base = build_tree()
    base["logging"].pop("tensorboard", None)
    base["logging"]["trackers"] = trackers
    plan = build_plan(*load_study(write_study(tmp_path, base)))
    for run in plan.runs:
        logging = run.config.logging
        shown = (
            (plan.directory.name, [run.cell.variant, run.cell.size]) if "wandb" in trackers else (None, [])
        )
        assert (logging.tracker_group, logging.tracker_tags) == shown
