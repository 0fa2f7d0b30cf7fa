"""A run that SLURM preempts, or whose nodes fail, ends bit-identically to an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.end_to_end.nodes import steps
from tests.end_to_end.slurm_cluster import SlurmCluster, missing_for_slurm, running_cluster
from tests.end_to_end.test_slurm import JOB_SECONDS, TWO_NODES, submit
from tests.small_data import SmallData
from tests.training.test_runs import assert_same_final_state, complete, records

pytestmark = pytest.mark.system_packages("slurmctld", "slurmd", "slurm-client", "munge")
PREEMPTIONS = 10
GRACE_SECONDS = 60


def config_of(small_data: SmallData, directory: Path, **training: Any) -> RunConfig:
    """Return a run with more steps than it will make: the test ends it with `stop_after_steps`."""
    return small_data.run(
        directory,
        parallel={"tensor": 2},
        model={"hidden_dropout": 0.1},
        training={"num_steps": 5000, **training},
        evaluation={"interval": None, "num_sequences": 2},
        checkpoint={"interval": 10, "keep_last": 2},
    )


class Job:
    """A run that SLURM requeues until the test ends it."""

    def __init__(self, slurm: SlurmCluster, small_data: SmallData, folder: Path) -> None:
        self.slurm, self.small_data, self.folder = slurm, small_data, folder
        self.run_directory = folder / "run"
        self._write_config()
        script = ("launch/slurm_train.sbatch", str(folder / "run.yaml"))
        self.number = submit(slurm, folder, *TWO_NODES, *script)

    def wait_for_attempt(self, attempt: int) -> None:
        """Wait until the run has made some steps in this attempt, and has a checkpoint."""
        first = None

        def has_stepped() -> bool:
            nonlocal first
            if f"attempt {attempt} of job" not in self.output() or not steps(self.run_directory):
                return False
            first = first or steps(self.run_directory)[-1]
            return steps(self.run_directory)[-1] > first + 2 and any(self.checkpoints().glob("iter_*"))

        self.slurm.wait_until(has_stepped, self.number, seconds=JOB_SECONDS)

    def wait_for(self, *states: str) -> None:
        self.slurm.wait_for(self.number, *states, seconds=JOB_SECONDS)

    def end_in_next_attempt(self, ranks: Any) -> RunConfig:
        """Let the next attempt end the run, and complete an undisturbed run of the same length.

        It must be called between two attempts.
        """
        last = steps(self.run_directory)[-1] + 7
        self._write_config(stop_after_steps=last)
        undisturbed = config_of(self.small_data, self.folder / "undisturbed", stop_after_steps=last)
        ranks(2).run(complete, undisturbed)
        return undisturbed

    def checkpoints(self) -> Path:
        return self.run_directory / "checkpoints"

    def nodes(self) -> list[str]:
        """Return the nodes on which it runs, the node of rank 0 first."""
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


def check_end(job: Job, undisturbed: RunConfig, *, restarts: int) -> None:
    """Wait for the end of a job and check that it is bit-identical to the undisturbed run."""
    job.wait_for("COMPLETED", "FAILED")
    assert job.slurm.state(job.number) == "COMPLETED", job.output()
    assert job.num_restarts() == restarts
    last = undisturbed.training.stop_after_steps
    assert last is not None
    requeued = config_of(job.small_data, job.run_directory, stop_after_steps=last)
    assert_same_final_state(requeued, undisturbed)
    assert steps(job.run_directory) == list(range(1, last + 1))
    compared_keys = ("train_loss", "gradient_norm")
    assert [[record[key] for key in compared_keys] for record in records(requeued)] == [
        [record[key] for key in compared_keys] for record in records(undisturbed)
    ]


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_ten_preemptions_do_not_change_the_run(
    slurm: SlurmCluster, ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    job = Job(slurm, small_data, tmp_path)
    for attempt in range(1, PREEMPTIONS + 1):
        # With a grace time the job script requeues the run; without one, SLURM does.
        grace = GRACE_SECONDS if attempt % 2 == 0 else 0
        slurm.call("scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
        job.wait_for_attempt(attempt)
        preempting_job = slurm.call(
            *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
            *("--output=/dev/null", "--wrap=sleep 600"),
        )
        slurm.wait_for(preempting_job, "RUNNING", seconds=JOB_SECONDS)
        assert slurm.state(job.number) == "PENDING", job.output()
        assert json.loads((job.run_directory / "stopped.json").read_text())["exit_reason"] == "signal SIGTERM"
        if attempt == PREEMPTIONS:
            undisturbed = job.end_in_next_attempt(ranks)
        slurm.call("scancel", preempting_job)
    check_end(job, undisturbed, restarts=PREEMPTIONS)
    assert job.output().count("requeueing the job") == PREEMPTIONS // 2
    assert job.output().count("DUE TO PREEMPTION") >= PREEMPTIONS - PREEMPTIONS // 2


@pytest.fixture
def failing_cluster() -> Iterator[SlurmCluster]:
    if reason := missing_for_slurm():
        pytest.skip(reason)
    with running_cluster(nodes=3, seconds_to_lose_a_node=20) as cluster:
        yield cluster


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_lost_node_is_replaced_or_awaited_and_does_not_change_the_run(
    failing_cluster: SlurmCluster, ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    job = Job(failing_cluster, small_data, tmp_path)
    job.wait_for_attempt(1)
    _, dead = job.nodes()
    failing_cluster.kill_node(dead)
    job.wait_for_attempt(2)
    assert dead not in job.nodes(), "another node replaces it"
    _, silent = job.nodes()
    # The processes on this node keep running at first.
    failing_cluster.kill_daemon(silent)
    job.wait_for("PENDING")
    undisturbed = job.end_in_next_attempt(ranks)
    assert failing_cluster.state(job.number) == "PENDING", "two of three nodes are lost"
    failing_cluster.start_node(dead)
    check_end(job, undisturbed, restarts=2)
    assert job.output().count("DUE TO NODE FAILURE") >= 2
