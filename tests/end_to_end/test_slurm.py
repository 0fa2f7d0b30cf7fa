"""The batch scripts in launch/ and plain srun, on a real SLURM cluster of two nodes."""

from __future__ import annotations

import functools
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.nodes import MARGIN_SECONDS, SECONDS_TO_REPORT, losses, world_size, write_config
from tests.end_to_end.slurm_cluster import SlurmCluster
from tests.end_to_end.test_launching import shell
from tests.small_data import SmallData

pytestmark = pytest.mark.system_packages("slurmctld", "slurmd", "slurm-client", "munge")
# Time limit of a job on two busy cores; idle cores need a quarter of it.
JOB_SECONDS = 240
VENV = Path(sys.prefix)
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


def submit(slurm: SlurmCluster, folder: Path, *arguments: str, **environment: str) -> str:
    """Submit a job and return its number; its output goes to `folder`/output (arrays: output-TASK)."""
    output = "output-%a" if any(argument.startswith("--array") for argument in arguments) else "output"
    return slurm.call(
        "sbatch",
        "--parsable",
        f"--chdir={ROOT}",
        f"--output={folder}/{output}",
        *arguments,
        SAS_MEGATRON_VENV=str(VENV),
        PYTHONPATH=str(ROOT),
        **environment,
    )


def test_an_array_trains_on_two_nodes_although_one_of_its_tasks_fails(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path, local_losses: list[float]
) -> None:
    """The only training run with SLURM in the default tests; both scripts, and torchrun on each node."""
    config = write_config(small_data, tmp_path)
    runs = tmp_path / "runs"
    runs.write_text(
        f"{config} attention.kernel_size=4 logging.run_directory={tmp_path}/bad\n"
        f"{config} 'data.split=[0.8, 0.2]' logging.run_directory={tmp_path}/good\n"
    )
    job = submit(slurm, tmp_path, *TWO_NODES, "--array=1-2", "launch/slurm_study.sbatch", str(runs))
    assert slurm.wait_for(f"{job}_1", "COMPLETED", "FAILED", seconds=JOB_SECONDS) == "FAILED"
    assert (tmp_path / "output-1").read_text().count("attention.kernel_size=4: must be odd") == 1
    assert "ExitCode=2:0" in slurm.call("scontrol", "show", "job", f"{job}_1")
    assert not (tmp_path / "bad").exists()

    state = slurm.wait_for(f"{job}_2", "COMPLETED", "FAILED", seconds=JOB_SECONDS)
    assert state == "COMPLETED", (tmp_path / "output-2").read_text()
    assert losses(tmp_path / "good") == local_losses
    assert world_size(tmp_path / "good") == 2
    logs = {path.parts[-5]: path for path in (tmp_path / "good" / "logs").rglob("stdout.log")}
    assert sorted(logs) == ["node0", "node1"]
    assert "lm loss:" in logs["node0"].read_text()
    assert "lm loss:" not in logs["node1"].read_text()


@pytest.mark.exhaustive
def test_plain_srun_trains_with_one_rank_per_task(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path, local_losses: list[float]
) -> None:
    slurm.call(
        *("srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit", f"--chdir={ROOT}", "--time=5"),
        *(str(VENV / "bin" / "sas-megatron"), "train", str(write_config(small_data, tmp_path))),
        timeout=JOB_SECONDS,
        PYTHONPATH=str(ROOT),
    )
    assert losses(tmp_path / "run") == local_losses
    assert world_size(tmp_path / "run") == 2


@pytest.fixture
def port_in_use() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize(
    "fault",
    [
        "a world size that does not fit",
        *(
            pytest.param(fault, marks=pytest.mark.exhaustive)
            for fault in ("a port in use", "an unknown host", "an unreachable host")
        ),
    ],
)
def test_plain_srun_reports_a_start_up_error_once_and_in_time(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path, port_in_use: str, fault: str
) -> None:
    # An address that is reserved for documentation (RFC 5737).
    unreachable = {"MASTER_ADDR": "192.0.2.1", "JOIN_SECONDS": "5"}
    variables, override, message = {
        "a port in use": ({"MASTER_PORT": port_in_use}, "", f"MASTER_PORT={port_in_use}: is not available"),
        "a world size that does not fit": ({}, "parallel.context=2", "world size=2: must be a multiple of 4"),
        "an unknown host": (
            {"MASTER_ADDR": "no-such.invalid"},
            "",
            "MASTER_ADDR=no-such.invalid: cannot be resolved",
        ),
        "an unreachable host": (unreachable, "", r"192\.0\.2\.1"),
    }[fault]
    before, start_time = set(slurm.processes()), time.monotonic()
    slurm.call(
        *("srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit", f"--chdir={ROOT}", "--time=5"),
        *(f"--output={tmp_path}/output", str(VENV / "bin" / "sas-megatron"), "train"),
        *(str(write_config(small_data, tmp_path)), *([override] if override else [])),
        check=False,
        timeout=JOB_SECONDS,
        PYTHONPATH=str(ROOT),
        **variables,
    )
    assert time.monotonic() - start_time < SECONDS_TO_REPORT + MARGIN_SECONDS
    output = (tmp_path / "output").read_text()
    (error,) = re.findall(r"^sas-megatron: error: (.*)$", output, re.MULTILINE)
    assert re.search(message, error), output
    assert not (tmp_path / "run").exists()
    slurm.wait_until(lambda: not set(slurm.processes()) - before, "", seconds=60)


@pytest.mark.exhaustive
def test_doctor_examines_an_allocation_under_srun(slurm: SlurmCluster, tmp_path: Path) -> None:
    output = slurm.call(
        *("srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit", f"--chdir={ROOT}", "--time=5"),
        *(str(VENV / "bin" / "sas-megatron"), "doctor", "--json", f"--run-directory={tmp_path}"),
        timeout=JOB_SECONDS,
        PYTHONPATH=str(ROOT),
    )
    record = json.loads(output)
    assert record["ranks"] == 2
    checks = [found["check"] for found in record["findings"]]
    assert checks.count("open files") == 2, "one per node"
    assert checks.count("all-reduce") == 1
    assert record["verdict"] != "failure", output


@pytest.mark.exhaustive
def test_a_cancelled_job_leaves_a_checkpoint_for_resuming_and_no_process(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    config = write_config(
        small_data,
        tmp_path,
        training={"num_steps": 5000},
        evaluation={"interval": None, "num_sequences": 2},
        checkpoint={"interval": 2},
    )
    before = set(slurm.processes())
    job = submit(slurm, tmp_path, *TWO_NODES, "launch/slurm_train.sbatch", str(config))
    slurm.wait_until(
        lambda: list((tmp_path / "run" / "checkpoints").glob("iter_*")), job, seconds=JOB_SECONDS
    )
    slurm.call("scancel", job)
    slurm.wait_for(job, "CANCELLED", seconds=JOB_SECONDS)
    slurm.wait_until(lambda: not slurm.call("squeue", "-h"), job, seconds=60)
    slurm.wait_until(lambda: not set(slurm.processes()) - before, job, seconds=60)
    finished = len(losses(tmp_path / "run"))
    done = shell(
        *("launch/torchrun.sh", "2", str(config), "checkpoint.resume=true"),
        f"training.stop_after_steps={finished + 2}",
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert len(losses(tmp_path / "run")) == finished + 2


@pytest.mark.exhaustive
def test_a_run_at_its_time_limit_is_requeued_and_resumes(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    config = write_config(small_data, tmp_path, training={"num_steps": 4000, "stop_after_steps": 3000})
    job = submit(slurm, tmp_path, *TWO_NODES, "launch/slurm_train.sbatch", str(config), MAX_REQUEUES="1")
    metrics, output = tmp_path / "run" / "metrics.jsonl", tmp_path / "output"

    def has_stepped(attempt: int) -> bool:
        text = output.read_text() if output.exists() else ""
        return text.partition(f"attempt {attempt} of")[2].count("lm loss:") > 2

    for attempt in (1, 2):
        # The signal that --signal=B:USR1@… sends before the time limit.
        slurm.wait_until(functools.partial(has_stepped, attempt), job, seconds=JOB_SECONDS)
        slurm.call("scancel", "--batch", "--signal=USR1", job)
        if attempt == 1:
            slurm.wait_until(lambda: (tmp_path / "run" / "stopped.json").exists(), job, seconds=60)
    # MAX_REQUEUES is reached: the job ends, although the run is not finished.
    assert slurm.wait_for(job, "FAILED", seconds=JOB_SECONDS) == "FAILED"
    text = output.read_text()
    assert "attempt 1 stopped:" in text
    assert "resuming from" in text
    assert "MAX_REQUEUES" in text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps)
