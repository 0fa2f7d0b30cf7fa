"""However often SLURM takes nodes away, or loses them, a run goes on and ends as if it had kept them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.end_to_end.nodes import steps
from tests.end_to_end.slurm_cluster import SlurmCluster, lacking_for_slurm, running_cluster
from tests.end_to_end.test_slurm import JOB_SECONDS, TWO_NODES, submit
from tests.small_data import SmallData
from tests.training.test_runs import assert_end_alike, complete, records

pytestmark = pytest.mark.system_packages("slurmctld", "slurmd", "slurm-client", "munge")
PREEMPTIONS = 10
NOTICE_SECONDS = 60


def config_of(small_data: SmallData, directory: Path, **training: Any) -> RunConfig:
    """More steps than are ever taken: the run is told to stop when it has been through enough."""
    return small_data.run(
        directory,
        parallel={"tensor": 2},
        model={"hidden_dropout": 0.1},
        training={"num_steps": 5000, **training},
        evaluation={"interval": None, "num_sequences": 2},
        checkpoint={"interval": 10, "keep_last": 2},
    )


class Job:
    """A run that SLURM queues again, and which can be told to end."""

    def __init__(self, slurm: SlurmCluster, small_data: SmallData, folder: Path) -> None:
        self.slurm, self.small_data, self.folder = slurm, small_data, folder
        self.run_directory = folder / "run"
        self._write_config()
        script = ("launch/slurm_train.sbatch", str(folder / "run.yaml"))
        self.number = submit(slurm, folder, *TWO_NODES, *script)

    def wait_for_turn(self, turn: int) -> None:
        """Until the run has taken some steps in it."""
        before = None

        def has_stepped() -> bool:
            nonlocal before
            if f"attempt {turn} of job" not in self.output() or not steps(self.run_directory):
                return False
            before = before or steps(self.run_directory)[-1]
            return steps(self.run_directory)[-1] > before + 2 and any(self.checkpoints().glob("iter_*"))

        self.slurm.wait_until(has_stepped, self.number, seconds=JOB_SECONDS)

    def wait_for(self, *states: str) -> None:
        self.slurm.wait_for(self.number, *states, seconds=JOB_SECONDS)

    def end_soon(self, ranks: Any) -> RunConfig:
        """Between two turns: tells it to end within the next, and gives the undisturbed run until there."""
        last = steps(self.run_directory)[-1] + 7
        self._write_config(stop_after_steps=last)
        alone = config_of(self.small_data, self.folder / "alone", stop_after_steps=last)
        ranks(2).run(complete, alone)
        return alone

    def checkpoints(self) -> Path:
        return self.run_directory / "checkpoints"

    def nodes(self) -> list[str]:
        """On which it runs, the first rank's first."""
        names = self.slurm.call("squeue", "-h", "-j", self.number, "-o", "%N")
        return self.slurm.call("scontrol", "show", "hostnames", names).split()

    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""

    def num_restarts(self) -> int:
        fields = self.slurm.call("scontrol", "show", "job", self.number).split()
        (count,) = (field.removeprefix("Restarts=") for field in fields if field.startswith("Restarts="))
        return int(count)

    def _write_config(self, **training: Any) -> None:
        config = config_of(self.small_data, self.run_directory, **training)
        (self.folder / "run.yaml").write_text(dump_yaml(config))


def check_that_it_ends_as(alone: RunConfig, job: Job, *, restarts: int) -> None:
    """To the bit, with every step once."""
    job.wait_for("COMPLETED", "FAILED")
    assert job.slurm.state(job.number) == "COMPLETED", job.output()
    assert job.num_restarts() == restarts
    last = alone.training.stop_after_steps
    assert last is not None
    ended = config_of(job.small_data, job.run_directory, stop_after_steps=last)
    assert_end_alike(ended, alone)
    assert steps(job.run_directory) == list(range(1, last + 1))
    timeless = ("train_loss", "gradient_norm")
    assert [[record[key] for key in timeless] for record in records(ended)] == [
        [record[key] for key in timeless] for record in records(alone)
    ]


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_ten_preemptions_in_a_row_change_no_bit(
    slurm: SlurmCluster, ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    job = Job(slurm, small_data, tmp_path)
    for turn in range(1, PREEMPTIONS + 1):
        # With notice the run's own script queues it again; without, SLURM does.
        notice = NOTICE_SECONDS if turn % 2 == 0 else 0
        slurm.call("scontrol", "update", "PartitionName=main", f"GraceTime={notice}")
        job.wait_for_turn(turn)
        taker = slurm.call(
            *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
            *("--output=/dev/null", "--wrap=sleep 600"),
        )
        slurm.wait_for(taker, "RUNNING", seconds=JOB_SECONDS)
        assert slurm.state(job.number) == "PENDING", job.output()
        assert json.loads((job.run_directory / "stopped.json").read_text())["exit_reason"] == "signal SIGTERM"
        if turn == PREEMPTIONS:
            alone = job.end_soon(ranks)
        slurm.call("scancel", taker)
    check_that_it_ends_as(alone, job, restarts=PREEMPTIONS)
    assert job.output().count("requeueing the job") == PREEMPTIONS // 2
    assert job.output().count("DUE TO PREEMPTION") >= PREEMPTIONS - PREEMPTIONS // 2


@pytest.fixture
def failing_cluster() -> Iterator[SlurmCluster]:
    if reason := lacking_for_slurm():
        pytest.skip(reason)
    with running_cluster(nodes=3, seconds_to_lose_a_node=20) as cluster:
        yield cluster


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_lost_node_is_replaced_or_waited_for_and_changes_no_bit(
    failing_cluster: SlurmCluster, ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    job = Job(failing_cluster, small_data, tmp_path)
    job.wait_for_turn(1)
    _, dead = job.nodes()
    failing_cluster.kill_node(dead)
    job.wait_for_turn(2)
    assert dead not in job.nodes(), "another takes its place"
    _, silent = job.nodes()
    # What runs there goes on at first.
    failing_cluster.kill_daemon(silent)
    job.wait_for("PENDING")
    alone = job.end_soon(ranks)
    assert failing_cluster.state(job.number) == "PENDING", "there are not nodes enough"
    failing_cluster.start_node(dead)
    check_that_it_ends_as(alone, job, restarts=2)
    assert job.output().count("DUE TO NODE FAILURE") >= 2
