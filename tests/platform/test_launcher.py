"""The environment variables that launchers set, and those derived under plain srun."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.launcher import (
    FIRST_PORT,
    NUM_PORTS,
    check_rendezvous_address,
    join_seconds,
    launched_world_size,
    set_rank_from_slurm,
    slurm_job_port,
)

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The variables that srun sets for the second of three tasks. With MASTER_ADDR set, no SLURM command runs.
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "MASTER_ADDR": "localhost",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")  # so that it is restored after set_rank_from_slurm
        monkeypatch.delenv(name)
    return monkeypatch


def variables_after(environment: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    for name, value in variables.items():
        environment.setenv(name, value)
    set_rank_from_slurm()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_each_task_of_a_step_is_a_rank(environment: pytest.MonkeyPatch) -> None:
    variables = variables_after(environment, **STEP)
    assert variables == {
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(slurm_job_port(STEP)),
    }


def test_variables_of_another_launcher_inside_a_step_are_kept(environment: pytest.MonkeyPatch) -> None:
    assert variables_after(environment, **STEP, RANK="0", WORLD_SIZE="2")["WORLD_SIZE"] == "2"


@pytest.mark.parametrize("variables", [{}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8"}])
def test_a_single_process_stays_a_world_of_one(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Also the batch shell of a job with several tasks, and a step with one task (an interactive shell)."""
    assert "RANK" not in variables_after(environment, **variables)


def test_the_error_without_scontrol_names_the_variable_to_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("PATH", "")
    with pytest.raises(
        FieldError,
        match=r"MASTER_ADDR=None: is not set, and SLURM does not report the address .*scontrol.*; set it to",
    ):
        variables_after(environment, **{name: value for name, value in STEP.items() if name != "MASTER_ADDR"})


def test_jobs_and_steps_get_different_ports_below_those_of_the_kernel() -> None:
    ports = {
        slurm_job_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(100, 130)
        for step in range(7)
    }
    assert len(ports) == 30 * 7
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS <= 32768 for port in ports)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        *(("WORLD_SIZE", value, launched_world_size) for value in ("two", "0", "-2", "1.5", "")),
        *(("MASTER_PORT", value, check_rendezvous_address) for value in ("http", "0", "65536")),
        *(("JOIN_SECONDS", value, join_seconds) for value in ("soon", "0", "-1", "nan", "inf")),
    ],
)
def test_variables_that_are_not_valid_numbers_are_rejected(
    environment: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], object]
) -> None:
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    environment.delenv("RANK", raising=False)
    environment.setenv(name, value)
    with pytest.raises(FieldError, match=rf"^{name}={value}: must be a "):
        read()
