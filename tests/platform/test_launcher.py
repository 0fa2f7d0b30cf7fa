"""A process's place, as launchers tell it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.launcher import (
    FIRST_PORT,
    NUM_PORTS,
    check_meeting_place,
    join_seconds,
    launched_world_size,
    port_of_job,
    take_place,
)

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Of the second task of three, as srun sets it; no SLURM is asked, as the address is given.
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
        monkeypatch.setenv(name, "")  # for it to be put back, whatever take_place does
        monkeypatch.delenv(name)
    return monkeypatch


def placed(environment: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    for name, value in variables.items():
        environment.setenv(name, value)
    take_place()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_task_of_a_step_is_a_rank(environment: pytest.MonkeyPatch) -> None:
    place = placed(environment, **STEP)
    assert place == {
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port_of_job(STEP)),
    }


def test_another_launcher_inside_a_step_decides(environment: pytest.MonkeyPatch) -> None:
    assert placed(environment, **STEP, RANK="0", WORLD_SIZE="2")["WORLD_SIZE"] == "2"


@pytest.mark.parametrize("variables", [{}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8"}])
def test_a_process_alone_stays_alone(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Also the batch shell of a job of many tasks, and one task in a step: an interactive shell."""
    assert "RANK" not in placed(environment, **variables)


def test_a_step_whose_slurm_cannot_be_asked_says_what_to_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("PATH", "")
    with pytest.raises(
        FieldError, match=r"MASTER_ADDR=None: cannot be had from SLURM .*scontrol.*; set it to"
    ):
        placed(environment, **{name: value for name, value in STEP.items() if name != "MASTER_ADDR"})


def test_jobs_and_steps_get_ports_of_their_own_below_those_of_the_kernel() -> None:
    ports = {
        port_of_job({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(100, 130)
        for step in range(7)
    }
    assert len(ports) == 30 * 7
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS <= 32768 for port in ports)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        *(("WORLD_SIZE", value, launched_world_size) for value in ("two", "0", "-2", "1.5", "")),
        *(("MASTER_PORT", value, check_meeting_place) for value in ("http", "0", "65536")),
        *(("JOIN_SECONDS", value, join_seconds) for value in ("soon", "0", "-1", "nan", "inf")),
    ],
)
def test_variables_that_are_no_numbers_are_told(
    environment: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], object]
) -> None:
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    environment.delenv("RANK", raising=False)
    environment.setenv(name, value)
    with pytest.raises(FieldError, match=rf"^{name}={value}: must be a "):
        read()
