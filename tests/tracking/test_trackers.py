"""W&B offline and MLflow in a database: equal ids over sessions, and each step once, also after kill -9."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.tracking.sent_record import Pending, read_sent_record, record_path, write_sent_record
from sas_megatron.tracking.sync import SyncResult, sync_run
from tests.conftest import ROOT
from tests.end_to_end.started_processes import environment_with
from tests.selection import exhaustive
from tests.tracking.tracked_runs import (
    expected_steps,
    read_offline_parts,
    steps_in_database,
    steps_in_parts,
    write_run,
)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of MLflow's database; W&B is offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs.db"


def test_wandb_offline_has_one_run_over_sessions_and_each_step_once(tmp_path: Path, offline: Path) -> None:
    run = tmp_path / "run"
    run_id = write_run(run, last=12, tracker_group="study", tracker_tags=["sas", "10m"], tracker_project="p")
    assert sync_run(run, ["wandb"]) == [SyncResult("wandb", 11, 11)]
    write_run(run, first=9, last=21, exit_reason="finished", tracker_project="p")
    assert sync_run(run, ["wandb"]) == [SyncResult("wandb", 10, 21)]
    assert steps_in_parts(run) == expected_steps(21)
    runs = [record.run for record in read_offline_parts(run) if record.WhichOneof("record_type") == "run"]
    assert {found.run_id for found in runs} == {run_id}
    assert {found.project for found in runs} == {"p"}
    assert (runs[0].run_group, list(runs[0].tags), runs[0].display_name) == ("study", ["sas", "10m"], "run")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["model.hidden_size"] == 20
    # Nothing about the machine or the program.
    assert not list((run / "wandb").rglob("requirements.txt"))
    assert not list((run / "trackers").glob("wandb.unpublished*"))


@pytest.mark.parametrize("is_published", [True, False])
def test_an_interrupted_part_of_wandb_counts_if_it_was_published(
    tmp_path: Path, offline: Path, is_published: bool
) -> None:
    run = tmp_path / "run"
    write_run(run, last=9, exit_reason="finished")
    sync_run(run, ["wandb"])
    record = read_sent_record(run, "wandb")
    assert record is not None
    (part,) = (run / "wandb").iterdir()
    # The state of a process that was killed after, or before, it gave the part its final name.
    pending = Pending(last_step=9, folder=part.name)
    write_sent_record(run, "wandb", record.model_copy(update={"last_step": 0, "pending": pending}))
    if not is_published:
        unpublished = run / "trackers" / "wandb.unpublished.1"
        unpublished.mkdir()
        part.rename(unpublished / part.name)
    sync_run(run, ["wandb"])
    assert steps_in_parts(run) == expected_steps(9)
    assert not list((run / "trackers").glob("wandb.unpublished*"))
    assert read_sent_record(run, "wandb") == record


def test_mlflow_has_one_run_over_sessions_and_each_step_once(tmp_path: Path, offline: Path) -> None:
    run = tmp_path / "run"
    run_id = write_run(run, last=12, tracker_group="study", tracker_tags=["sas"], tracker_project="p")
    assert sync_run(run, ["mlflow"]) == [SyncResult("mlflow", 11, 11)]
    write_run(run, first=9, last=21, exit_reason="finished", tracker_project="p")
    # The state of a process that was killed before it recorded what it had created and sent.
    record_path(run, "mlflow").unlink()
    assert sync_run(run, ["mlflow"]) == [SyncResult("mlflow", 21, 21)]
    assert steps_in_database(offline) == expected_steps(21)
    with sqlite3.connect(offline) as database:
        tags = dict(database.execute("select key, value from tags").fetchall())
        assert tags["sas_megatron.run_id"] == run_id
        assert (tags["sas_megatron.group"], tags["sas_megatron.tag.sas"]) == ("study", "true")
        assert database.execute("select name, status from runs").fetchall() == [("run", "FINISHED")]
        parameters = dict(database.execute("select key, value from params").fetchall())
        assert parameters["model.hidden_size"] == "20"
        times = database.execute("select timestamp from metrics where key='lm loss' order by step").fetchall()
        assert times[20][0] - times[0][0] == 10_000, "20 steps of half a second"


def run_sync(run: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sas_megatron", "runs", "sync", str(run), "--tracker", "mlflow"],
        env=environment_with(**environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@exhaustive  # the client waits
def test_a_server_that_does_not_answer_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, last=3, exit_reason="finished")
    done = run_sync(run, MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")
    assert done.returncode == 1, done.stderr
    assert "mlflow: the last step that was sent is 0: " in done.stdout
    assert "Traceback" not in done.stderr
    assert (
        "secret" not in (run / "trackers" / "mlflow.json").read_text()
        if record_path(run, "mlflow").exists()
        else True
    )
    done = run_sync(run, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'runs.db'}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert steps_in_database(tmp_path / "runs.db") == expected_steps(3)


@exhaustive
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_sync_that_is_killed_ten_times_loses_and_repeats_nothing(tracker: str, tmp_path: Path) -> None:
    run, database = tmp_path / "run", tmp_path / "runs.db"
    environment = environment_with(
        WANDB_MODE="offline", MLFLOW_TRACKING_URI=f"sqlite:///{database}", PYTHONPATH=str(ROOT)
    )
    command = [sys.executable, "-m", "sas_megatron", "runs", "sync", str(run), "--tracker", tracker]
    moments, killed, last = random.Random(7), 0, 0
    started = time.monotonic()
    write_run(run, last=1)
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=300)
    duration = time.monotonic() - started
    while killed < 10:
        first, last = max(1, last - 3), last + 40
        write_run(run, first=first, last=last)
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(moments.uniform(0.3, 1.1) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    write_run(run, first=last + 1, last=last + 5, exit_reason="finished")
    for _ in range(2):
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=300)
    found = steps_in_parts(run) if tracker == "wandb" else steps_in_database(database)
    assert found == expected_steps(last + 5)


class OnlineRun:
    """W&B's run at a server that has received the steps of an earlier process."""

    def __init__(self, received: list[int]) -> None:
        self.received, self.step = received, received[-1] + 1 if received else 0

    def log(self, scalars: dict[str, float], *, step: int, commit: bool) -> None:
        assert commit
        assert "lm loss" in scalars
        self.received.append(step)

    def finish(self, *, exit_code: int) -> None:
        assert exit_code == 0


def test_wandb_online_continues_after_the_last_step_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sas_megatron.tracking import wandb_tracker

    monkeypatch.delenv("WANDB_MODE", raising=False)
    received: list[int] = []
    opened: list[Any] = []

    def init(run: Any, *, folder: Path, mode: str) -> Any:
        opened.append(SimpleNamespace(run_id=run.run_id, mode=mode))
        return OnlineRun(received)

    monkeypatch.setattr(wandb_tracker, "_init", init)
    run_id = write_run(tmp_path, last=8)
    sync_run(tmp_path, ["wandb"])
    # A process that was killed had sent more than it recorded.
    received.append(8)
    write_run(tmp_path, first=8, last=12)
    sync_run(tmp_path, ["wandb"])
    assert received == list(range(1, 12))
    # A machine failed before W&B's own process had sent all that was recorded.
    del received[9:]
    write_run(tmp_path, first=12, last=14, exit_reason="finished")
    sync_run(tmp_path, ["wandb"])
    assert received == list(range(1, 15))
    assert opened == [SimpleNamespace(run_id=run_id, mode="online")] * 3
