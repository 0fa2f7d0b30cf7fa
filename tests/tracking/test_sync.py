"""The record of the last step that was sent: no step is lost, and none is sent twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.tracking import sync
from sas_megatron.tracking.rows import Row
from sas_megatron.tracking.sent_record import SentRecord, locked, read_sent_record
from sas_megatron.tracking.sync import SyncResult, sync_run
from sas_megatron.tracking.tracker import NotReached, Save, TrackedRun, Tracker, check_installed
from tests.fork_server import run_command
from tests.tracking.tracked_runs import write_run


class MemoryTracker(Tracker):
    """Keeps the steps in a list, and fails before the step `fails_at`."""

    name = "mlflow"
    destination = "memory"
    received: list[int]
    fails_at = 0

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    def recover(self, record: SentRecord) -> SentRecord:
        return record

    def send(self, rows: Sequence[Row], record: SentRecord, save: Save) -> SentRecord:
        for row in rows:
            if row.step == type(self).fails_at:
                raise NotReached("connection refused")
            self.received.append(row.step)
            record = record.model_copy(update={"last_step": row.step})
            save(record)
        return record

    def close(self, *, has_finished: bool) -> None:
        pass


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the steps that a tracker in memory receives."""
    steps: list[int] = []
    monkeypatch.setattr(MemoryTracker, "received", steps, raising=False)
    monkeypatch.setattr(MemoryTracker, "fails_at", 0)
    monkeypatch.setattr(sync, "build_tracker", lambda _name, run: MemoryTracker(run))
    return steps


def test_each_step_is_sent_once_over_sessions(tmp_path: Path, received: list[int]) -> None:
    run_id = write_run(tmp_path, last=7)
    assert sync_run(tmp_path, ["mlflow"]) == [SyncResult("mlflow", 6, 6)]
    # The run was killed, resumes after step 4, and repeats steps 5 and 6.
    assert write_run(tmp_path, first=5, last=9, exit_reason="finished") == run_id
    assert sync_run(tmp_path, ["mlflow"]) == [SyncResult("mlflow", 3, 9)]
    assert sync_run(tmp_path, ["mlflow"]) == [SyncResult("mlflow", 0, 9)]
    assert received == list(range(1, 10))
    record = read_sent_record(tmp_path, "mlflow")
    assert record == SentRecord(run_id=run_id, destination="memory", last_step=9)


def test_a_tracker_that_is_not_reached_gets_the_rest_later(
    tmp_path: Path, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, last=8, exit_reason="finished")
    monkeypatch.setattr(MemoryTracker, "fails_at", 5)
    assert sync_run(tmp_path, ["mlflow"]) == [SyncResult("mlflow", 0, 4, "connection refused")]
    monkeypatch.setattr(MemoryTracker, "fails_at", 0)
    assert sync_run(tmp_path, ["mlflow"]) == [SyncResult("mlflow", 4, 8)]
    assert received == list(range(1, 9))


def test_a_run_that_another_process_sends_is_left_to_it(tmp_path: Path, received: list[int]) -> None:
    write_run(tmp_path, last=3)
    with locked(tmp_path, "mlflow", wait=False) as is_held:
        assert is_held
        (result,) = sync_run(tmp_path, ["mlflow"])
    assert (result.problem, received) == ("another process is sending this run", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"mlflow.json: is damaged \(.*\), so that the last step that was sent is unknown; restore it"),
        ('{"run_id": "x", "destination": "memory", "last_step": -1}', r"is damaged \(last_step: Input"),
        ('{"run_id": "x", "destination": "memory", "schema_version": 2}', r"is damaged \(schema_version"),
        ('{"run_id": "other", "destination": "memory"}', r"is that of another run \(other\); remove it"),
        (
            '{"run_id": "RUN", "destination": "there"}',
            r"is sent to there, and this .* to memory; restore the",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    tmp_path: Path, received: list[int], content: str, message: str
) -> None:
    run_id = write_run(tmp_path, last=3)
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "mlflow.json").write_text(content.replace("RUN", run_id))
    with pytest.raises(FileProblem, match=message):
        sync_run(tmp_path, ["mlflow"])
    assert received == []


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(["tensorboard"])
    # The second is what Python finds for a folder in the working directory.
    for found in (None, SimpleNamespace(origin=None)):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name, found=found: found)
        with pytest.raises(
            FieldError, match=r"names wandb, which is not installed; pip install 'sas-megatron\[wa"
        ):
            check_installed(["tensorboard", "wandb"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent/run.json: is missing, or has no sessions; name the directory of a run"),
        (["run"], "run: logging.trackers=[] names no tracker to send to; give --tracker"),
        (["damaged", "--tracker", "mlflow"], "damaged/run.json: is damaged ("),
        (["config", "--tracker", "mlflow"], "config/config.yaml: is not YAML ("),
    ],
)
def test_the_command_refuses_what_is_no_run(tmp_path: Path, arguments: list[str], message: str) -> None:
    for name in ("run", "damaged", "config"):
        write_run(tmp_path / name, last=2)
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "config" / "config.yaml").write_text("model: {")
    done = run_command("runs", "sync", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert f"sas-megatron: error: {message}" in done.stderr
    assert not list(tmp_path.glob("*/trackers/*.json"))
