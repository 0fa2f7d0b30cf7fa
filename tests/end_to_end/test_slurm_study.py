"""A study on a real SLURM cluster: arrays, branches after their trunks, and what has become of each run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.end_to_end.slurm_cluster import SlurmCluster
from tests.end_to_end.test_slurm import JOB_SECONDS, VENV
from tests.scaling.study.studies import write_study
from tests.scaling.study.test_running import STUDY, base_tree, plan_at, results
from tests.small_data import SmallData


def test_a_submitted_study_ends_as_one_run_here_and_what_fails_takes_only_its_branches_along(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    sizes = {
        "good": {"model.num_layers": 1},
        "bad": {"model.num_layers": 1, "optimizer.learning_rate": 1e30, "optimizer.clip_gradient_norm": 0},
    }
    study = {**STUDY, "variants": {"mha": {}}, "sizes": sizes}
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **study)
    (tmp_path / "here").mkdir()
    here = write_study(
        tmp_path / "here",
        base_tree(small_data, tmp_path / "none"),
        **{**study, "sizes": {"good": sizes["good"]}},
    )

    def command(*arguments: str) -> str:
        return slurm.call(
            *(sys.executable, "-m", "sas_megatron", "study", *arguments),
            SAS_MEGATRON_VENV=str(VENV),
            timeout=JOB_SECONDS,
        )

    options = ("--nodes=1", "--gpus-per-node=1", "--time=10")
    said = command("submit", str(path), *options)
    numbers = dict(line.removeprefix("» ").split(": job ") for line in said.splitlines())
    assert sorted(numbers) == sorted(run.name for run in plan_at(path).runs)
    first = numbers["mha-good-trunk-s1234"].split("_")[0]
    assert numbers["mha-bad-trunk-s1234"].split("_")[0] == first
    assert "nothing to submit" in command("submit", str(path), *options), "all have jobs"
    queue = slurm.call("squeue", "-h", "-r", "-o", "%F_%K %E")
    assert f"aftercorr:{first}_" in queue
    # Meanwhile: what has a job is not run here.
    run_here = (sys.executable, "-m", "sas_megatron", "study", "run", str(path), "--only", "mha-good-*")
    said = slurm.call(*run_here, check=False, timeout=JOB_SECONDS)
    assert all(line.startswith("» left to SLURM, which has their jobs: ") for line in said.splitlines()), said
    command("run", str(here))

    slurm.wait_until(lambda: not slurm.call("squeue", "-h"), first, seconds=JOB_SECONDS)
    states = {run["name"]: run for run in json.loads(command("status", str(path), "--json"))["runs"]}
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
    again = command("submit", str(path), *options)
    assert [line.split(":")[0] for line in again.splitlines()] == [
        *("» mha-bad-trunk-s1234", "» mha-bad-3200-s1234", "» mha-bad-6400-s1234")
    ], "only what has not finished"
    slurm.call("scancel", "--user=root")
    slurm.wait_until(lambda: not slurm.call("squeue", "-h"), first, seconds=60)
