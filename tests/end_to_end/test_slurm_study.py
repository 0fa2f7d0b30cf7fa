"""A study on a real SLURM cluster: arrays, branches that depend on their trunks, and states of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.slurm_cluster import SlurmCluster
from tests.end_to_end.test_slurm import JOB_SECONDS, VENV
from tests.fork_server import run_command
from tests.scaling.study.studies import write_study
from tests.scaling.study.test_running import STUDY, base_tree, plan_at, results
from tests.small_data import SmallData

pytestmark = pytest.mark.system_packages("slurmctld", "slurmd", "slurm-client", "munge")
OPTIONS = ("--nodes=1", "--gpus-per-node=1", "--time=10")
SIZES = {
    "good": {"model.num_layers": 1},
    "bad": {"model.num_layers": 1, "optimizer.learning_rate": 1e30, "optimizer.clip_gradient_norm": 0},
}
TRUNKS = ("mha-good-trunk-s1234", "mha-bad-trunk-s1234")


def study(slurm: SlurmCluster, *arguments: object, check: bool = True) -> str:
    """Run `sas-megatron study` and return its output."""
    environment = {**slurm.environment, "SAS_MEGATRON_VENV": str(VENV)}
    done = run_command("study", *arguments, environment=environment, timeout=JOB_SECONDS)
    assert done.returncode == 0 or not check, done.stdout + done.stderr + slurm.logs()
    return done.stdout.strip()


def write_studies(small_data: SmallData, tmp_path: Path) -> tuple[Path, Path]:
    """Write a study to submit, and a study of its `good` size to run without SLURM; return their paths."""
    base = base_tree(small_data, tmp_path / "none")
    path = write_study(tmp_path, base, **{**STUDY, "variants": {"mha": {}}, "sizes": SIZES})
    (tmp_path / "here").mkdir()
    good = {"good": SIZES["good"]}
    return path, write_study(tmp_path / "here", base, **{**STUDY, "variants": {"mha": {}}, "sizes": good})


def submitted_jobs(output: str) -> dict[str, str]:
    """Return the number of each run's job."""
    return dict(line.removeprefix("» ").split(": job ") for line in output.splitlines())


def wait_until_queue_is_empty(slurm: SlurmCluster, job: str) -> None:
    slurm.wait_until(lambda: not slurm.call("squeue", "-h"), job, seconds=JOB_SECONDS)


def test_a_study_is_submitted_as_arrays_whose_branches_wait_for_their_trunks(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    """The jobs are held, so that nothing trains."""
    path, _ = write_studies(small_data, tmp_path)
    numbers = submitted_jobs(study(slurm, "submit", path, *OPTIONS, "--hold"))
    runs = plan_at(path).runs
    assert sorted(numbers) == sorted(run.name for run in runs)
    (first,) = {numbers[trunk].split("_")[0] for trunk in TRUNKS}
    queue = dict(line.split() for line in slurm.call("squeue", "-h", "-r", "-o", "%F_%K %E").splitlines())
    assert sorted(queue) == sorted(numbers.values())
    for run in runs:
        if run.trunk is None:
            assert queue[numbers[run.name]] == "(null)"
        else:
            trunk, branch = numbers[run.trunk], numbers[run.name]
            assert trunk.split("_")[1] == branch.split("_")[1], "aftercorr connects tasks of the same number"
            assert queue[branch].startswith(f"aftercorr:{first}_")
    listed = {
        number.split("_")[0]: slurm.call("scontrol", "show", "job", number.split("_")[0])
        for number in numbers.values()
    }
    for run in runs:
        array, member = numbers[run.name].split("_")
        command = next(line for line in listed[array].splitlines() if "Command=" in line)
        lines = Path(command.split()[-1]).read_text().splitlines()
        assert run.name in lines[int(member) - 1]
    assert "nothing to submit" in study(slurm, "submit", path, *OPTIONS, "--hold"), "all have jobs"
    output = study(slurm, "run", path, "--only", "mha-good-*", check=False)
    message = "» not started, since they have SLURM jobs: "
    assert all(line.startswith(message) for line in output.splitlines()), output
    slurm.call("scancel", "--user=root")
    wait_until_queue_is_empty(slurm, first)
    resubmitted = submitted_jobs(study(slurm, "submit", path, *OPTIONS, "--hold"))
    assert sorted(resubmitted) == sorted(numbers), "runs that did not finish"
    slurm.call("scancel", "--user=root")
    wait_until_queue_is_empty(slurm, first)


@pytest.mark.exhaustive
def test_a_submitted_study_has_the_results_of_a_local_one_and_a_failing_run_stops_only_its_branches(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    path, here = write_studies(small_data, tmp_path)
    first = submitted_jobs(study(slurm, "submit", path, *OPTIONS))[TRUNKS[0]].split("_")[0]
    study(slurm, "run", here)
    wait_until_queue_is_empty(slurm, first)
    states = {run["name"]: run for run in json.loads(study(slurm, "status", path, "--json"))["runs"]}
    assert {name: run["state"] for name, run in states.items()} == {
        "mha-good-trunk-s1234": "done",
        "mha-good-3200-s1234": "done",
        "mha-good-6400-s1234": "done",
        "mha-bad-trunk-s1234": "failed",
        "mha-bad-3200-s1234": "waiting",
        "mha-bad-6400-s1234": "waiting",
    }
    assert "TrainingFault: step 5 after 3 skipped in a row" in states["mha-bad-trunk-s1234"]["reason"]
    good = {name: row for name, row in results(path).items() if "good" in name}
    assert good == results(here)
    resubmitted = submitted_jobs(study(slurm, "submit", path, *OPTIONS))
    assert list(resubmitted) == ["mha-bad-trunk-s1234", "mha-bad-3200-s1234", "mha-bad-6400-s1234"]
    slurm.call("scancel", "--user=root")
    wait_until_queue_is_empty(slurm, first)
