"""Several nodes with torchrun and deepspeed train one run, resume after a failure, and report errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.nodes import (
    MARGIN_SECONDS,
    RUN_SECONDS,
    SECONDS_TO_REPORT,
    Nodes,
    free_port,
    losses,
    started_nodes,
    steps,
    world_size,
    write_config,
)
from tests.end_to_end.two_hosts import ADDRESSES, missing_for_ssh, running_hosts
from tests.fork_server import ForkedCommand, run_command
from tests.small_data import SmallData

HOST = socket.gethostname()
# Two launchers on two busy cores can need longer to join than JOIN_SECONDS' default.
PATIENT = {"JOIN_SECONDS": "200"}
TWO_RANKS = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


needs_ssh = pytest.mark.system_packages("openssh-server", "openssh-client", "pdsh")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with started_nodes(tmp_path) as nodes:
        yield nodes


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    if reason := missing_for_ssh():
        pytest.skip(reason)
    with running_hosts() as hosts:
        yield hosts


def start_two(nodes: Nodes, script: str, *arguments: str, **environment: str) -> None:
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **PATIENT}
    for rank in ("0", "1"):
        nodes.start(script, "1", *arguments, **{**variables, "NODE_RANK": rank, **environment})


@pytest.mark.exhaustive
def test_torchrun_restarts_a_killed_rank_on_two_nodes_from_the_checkpoint(
    nodes: Nodes, small_data: SmallData, tmp_path: Path
) -> None:
    config = write_config(
        small_data,
        tmp_path,
        training={"num_steps": 100},
        checkpoint={"interval": 4},
        evaluation={"interval": None, "num_sequences": 2},
    )
    run_directory, logs = tmp_path / "run", tmp_path / "logs"
    start_two(
        *(nodes, "launch/torchrun.sh", str(config), "checkpoint.resume=true"),
        MAX_RESTARTS="1",
        LOG_DIR=str(logs),
    )
    nodes.wait_until(lambda: len(steps(run_directory)) >= 6)
    (victim,) = nodes.processes(RANK="1")
    os.kill(victim, signal.SIGKILL)
    assert nodes.wait() == [0, 0], nodes.output()
    assert not nodes.processes()
    assert re.search(r"resuming from \S+ at step [1-9]\d*", nodes.output()), nodes.output()
    assert steps(run_directory) == list(range(1, 101)), "each step once"
    # Each attempt of each process has a log; torch restarts both nodes but counts the attempt on one only.
    kept = {path.relative_to(logs).parts for path in logs.rglob("stderr.log")}
    assert {parts[0] for parts in kept} == {"node0", "node1"}
    assert {parts[2] for parts in kept} == {"attempt_0", "attempt_1"}


@pytest.mark.exhaustive
def test_nodes_without_a_rank_are_numbered_by_arrival(
    nodes: Nodes, small_data: SmallData, tmp_path: Path, local_losses: list[float]
) -> None:
    start_two(nodes, "launch/torchrun.sh", str(write_config(small_data, tmp_path)), NODE_RANK="")
    assert nodes.wait() == [0, 0], nodes.output()
    assert losses(tmp_path / "run") == local_losses


@pytest.mark.exhaustive
def test_deepspeed_trains_on_two_nodes_without_ssh(
    nodes: Nodes, small_data: SmallData, tmp_path: Path, local_losses: list[float]
) -> None:
    start_two(
        nodes, "launch/deepspeed.sh", str(write_config(small_data, tmp_path)), LOG_DIR=str(tmp_path / "logs")
    )
    assert nodes.wait() == [0, 0], nodes.output()
    assert losses(tmp_path / "run") == local_losses
    assert world_size(tmp_path / "run") == 2
    assert sorted(path.name.split("_")[-1] for path in (tmp_path / "logs").iterdir()) == [
        "rank0.log",
        "rank1.log",
    ]


def over_ssh(hosts: dict[str, str]) -> dict[str, str]:
    return {
        "PATH": f"{hosts['PATH_OF_SSH']}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOSTFILE": hosts["HOSTFILE"],
        "MASTER_ADDR": ADDRESSES["node1"],
        "MASTER_PORT": free_port(),
    }


@needs_ssh
def test_deepspeed_trains_on_two_hosts_over_ssh(
    hosts: dict[str, str],
    nodes: Nodes,
    small_data: SmallData,
    tmp_path: Path,
    local_losses: list[float],
) -> None:
    nodes.start("launch/deepspeed.sh", str(write_config(small_data, tmp_path)), **over_ssh(hosts))
    assert nodes.wait() == [0], nodes.output()
    assert not nodes.processes()
    assert losses(tmp_path / "run") == local_losses
    assert world_size(tmp_path / "run") == 2


# Errors at start-up: one rank reports them within a minute, and no process keeps running.


def errors_in_time(nodes: Nodes, start_time: float) -> list[str]:
    """Wait until all nodes have failed within the time limit, and return their errors."""
    statuses = nodes.wait(SECONDS_TO_REPORT + MARGIN_SECONDS)
    assert all(statuses), nodes.output()
    assert time.monotonic() - start_time < SECONDS_TO_REPORT + MARGIN_SECONDS
    assert not nodes.processes()
    return re.findall(r"^sas-megatron: error: (.*)$", nodes.output(), re.MULTILINE)


SCRIPTS = ["launch/torchrun.sh", "launch/deepspeed.sh"]


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_first_node_is_named(
    nodes: Nodes, small_data: SmallData, tmp_path: Path, rank: str, script: str
) -> None:
    start_time, config = time.monotonic(), str(write_config(small_data, tmp_path))
    nodes.start(script, "1", config, NNODES="2", NODE_RANK=rank, MASTER_ADDR="no-such-host.invalid")
    (error,) = errors_in_time(nodes, start_time)
    assert error.startswith(f"MASTER_ADDR=no-such-host.invalid: cannot be resolved on {HOST}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_first_node_that_does_not_answer_is_named(
    nodes: Nodes, small_data: SmallData, tmp_path: Path, script: str
) -> None:
    start_time, config = time.monotonic(), str(write_config(small_data, tmp_path))
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes.start(script, "1", config, **variables, JOIN_SECONDS="2")
    (error,) = errors_in_time(nodes, start_time)
    assert f"accepted no connection from {HOST} on MASTER_PORT={variables['MASTER_PORT']} within 2 s" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_taken_port_is_named(nodes: Nodes, small_data: SmallData, tmp_path: Path, script: str) -> None:
    start_time, config = time.monotonic(), str(write_config(small_data, tmp_path))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        nodes.start(script, "1", config, **variables)
        (error,) = errors_in_time(nodes, start_time)
    assert error.startswith(f"MASTER_PORT={port}: is not available on {HOST} (Address already in use)")


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_first_node_without_others_ends_with_an_error(
    nodes: Nodes, small_data: SmallData, tmp_path: Path, script: str
) -> None:
    start_time, config = time.monotonic(), str(write_config(small_data, tmp_path))
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes.start(script, "1", config, **variables, JOIN_SECONDS="3")
    errors = errors_in_time(nodes, start_time)
    assert "1/2 clients joined" in nodes.output()
    if script == "launch/deepspeed.sh":
        (error,) = errors
        address = f"127.0.0.1:{variables['MASTER_PORT']}"
        assert error.startswith(f"WORLD_SIZE=2: not all ranks connected to {address} within 3 s (")
    else:
        assert not errors, "torchrun reports it"


@needs_ssh
@pytest.mark.exhaustive
def test_hosts_do_not_wait_long_for_a_host_unknown_to_ssh(
    hosts: dict[str, str], nodes: Nodes, small_data: SmallData, tmp_path: Path
) -> None:
    start_time, config = time.monotonic(), str(write_config(small_data, tmp_path))
    (tmp_path / "hosts").write_text("node1 slots=1\nno-such-host.invalid slots=1\n")
    variables = {**over_ssh(hosts), "HOSTFILE": str(tmp_path / "hosts"), "JOIN_SECONDS": "5"}
    nodes.start("launch/deepspeed.sh", config, **variables)
    assert not errors_in_time(nodes, start_time), "pdsh prefixes each line with the host"
    assert "Could not resolve hostname no-such-host.invalid" in nodes.output()
    assert nodes.output().count("sas-megatron: error: WORLD_SIZE=2: not all ranks connected to") == 1


def test_a_rank_without_the_other_ranks_ends_in_time(small_data: SmallData, tmp_path: Path) -> None:
    port = free_port()
    rank = ForkedCommand(
        *("train", write_config(small_data, tmp_path)),
        environment={**os.environ, **TWO_RANKS, "RANK": "0", "MASTER_PORT": port, "JOIN_SECONDS": "3"},
    )
    try:
        assert rank.wait(SECONDS_TO_REPORT) == 2, rank.errors()
    finally:
        rank.kill()
    (error,) = re.findall(r"^sas-megatron: error: (.*)$", rank.errors(), re.MULTILINE)
    assert error.startswith(f"WORLD_SIZE=2: not all ranks connected to 127.0.0.1:{port} within 3 s (")


def task_of_step(rank: int, **environment: str) -> dict[str, str]:
    """Return the variables of one of two tasks of srun. MASTER_ADDR is set, so that SLURM is not queried."""
    step = {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    return {**os.environ, **step, **environment}


def test_tasks_of_a_slurm_step_train_as_ranks(
    small_data: SmallData, tmp_path: Path, local_losses: list[float]
) -> None:
    config, port = write_config(small_data, tmp_path), free_port()
    ranks = [
        ForkedCommand("train", config, environment=task_of_step(rank, MASTER_PORT=port)) for rank in range(2)
    ]
    try:
        assert [rank.wait(RUN_SECONDS) for rank in ranks] == [0, 0], "".join(rank.errors() for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert losses(tmp_path / "run") == local_losses
    assert world_size(tmp_path / "run") == 2


def test_a_slurm_step_that_cannot_start_reports_it(small_data: SmallData, tmp_path: Path) -> None:
    config = write_config(small_data, tmp_path)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = run_command("train", config, environment=task_of_step(0, MASTER_PORT=port))
    assert done.returncode == 2
    assert f"error: MASTER_PORT={port}: is not available on {HOST}" in done.stderr
    environment = task_of_step(0, MASTER_ADDR="no-such.invalid")
    done = run_command("train", config, environment=environment)
    assert done.returncode == 2
    assert "error: MASTER_ADDR=no-such.invalid: cannot be resolved" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_rank_reports_a_run_directory_that_nodes_do_not_share(
    small_data: SmallData, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("lacks root, which is needed to give a node its own file system")
    config, folder = write_config(small_data, tmp_path), tmp_path / "run"
    folder.mkdir()
    variables = {**os.environ, **TWO_RANKS, "MASTER_PORT": free_port()}
    ranks = [
        ForkedCommand("train", config, environment={**variables, "RANK": "0"}),
        ForkedCommand(
            *(folder, config),
            module="tests.end_to_end.training_on_own_file_system",
            environment={**variables, "RANK": "1"},
        ),
    ]
    try:
        assert [rank.wait(SECONDS_TO_REPORT) for rank in ranks] == [2, 2]
    finally:
        for rank in ranks:
            rank.kill()
    output = "".join(rank.errors() for rank in ranks)
    (error,) = re.findall(r"^sas-megatron: error: (.*)$", output, re.MULTILINE)
    assert f"is a different directory for rank 1 on {HOST} than for rank 0" in error
    assert not list(folder.iterdir())
