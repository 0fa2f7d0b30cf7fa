"""Nodes that come and go (NNODES=1:2): the run goes on from its checkpoint with those that are there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.end_to_end.nodes import Nodes, free_port, started_nodes, steps
from tests.small_data import SmallData
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.test_runs import complete, records

# A node's agent is missed after 15 s, and others are waited for another 30 (torch's defaults).
CHANGE_SECONDS = 240


def config_of(small_data: SmallData, directory: Path, **training: Any) -> RunConfig:
    return small_data.run(
        directory,
        training={"num_steps": 5000, "micro_batch_size": 2, **training},
        # So slow that sums in another order stay a rounding error over some hundred steps.
        optimizer={"learning_rate": 1e-5, "distributed": True},
        schedule={"kind": "constant", "warmup_steps": 0},
        evaluation={"interval": None, "num_sequences": 2},
        checkpoint={"interval": 5, "keep_last": 2},
    )


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with started_nodes(tmp_path) as nodes:
        yield nodes


def sessions(run_directory: Path) -> list[tuple[int, int]]:
    """World size and first step of each."""
    path = run_directory / "run.json"
    found = json.loads(path.read_text())["sessions"] if path.exists() else []
    return [(session["world_size"], session["from_step"]) for session in found]


@pytest.mark.exhaustive
def test_a_node_leaves_and_one_returns_and_the_batch_stays(
    nodes: Nodes, ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    run_directory, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(dump_yaml(config_of(small_data, run_directory)))
    place = {"NNODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "MAX_RESTARTS": "3"}

    def start_node(rank: str) -> None:
        command = ("launch/torchrun.sh", "1", str(path), "checkpoint.resume=true")
        nodes.start(*command, **place, NODE_RANK=rank, JOIN_SECONDS="200")

    def wait_for_session(number: int, num_ranks: int) -> None:
        """And for some steps in it, after which a checkpoint is there."""
        nodes.wait_until(lambda: len(sessions(run_directory)) == number, CHANGE_SECONDS)
        size, first = sessions(run_directory)[-1]
        assert size == num_ranks, nodes.output()
        nodes.wait_until(lambda: steps(run_directory)[-1:] >= [first + 7], CHANGE_SECONDS)

    start_node("0")
    start_node("1")
    wait_for_session(1, num_ranks=2)
    for pid in nodes.processes(NODE_RANK="1"):
        os.kill(pid, signal.SIGKILL)
    wait_for_session(2, num_ranks=1)
    start_node("1")
    wait_for_session(3, num_ranks=2)
    nodes.started[0].send_signal(signal.SIGUSR1)
    nodes.wait()
    assert not nodes.processes()

    stopped = json.loads((run_directory / "stopped.json").read_text())
    assert stopped["exit_reason"] in ("signal SIGUSR1", "signal SIGTERM"), nodes.output()
    last = stopped["step"]
    ended = config_of(small_data, run_directory, stop_after_steps=last)
    alone = config_of(small_data, tmp_path / "alone", stop_after_steps=last)
    ranks(2).run(complete, alone)
    assert steps(run_directory) == list(range(1, last + 1)), "each once"
    (_, left_at), (_, returned_at) = sessions(run_directory)[1:]
    assert 0 < left_at < returned_at < last
    for found, expected in zip(records(ended), records(alone), strict=True):
        assert found["consumed_samples"] == expected["consumed_samples"]
        if found["step"] <= left_at:
            assert found["train_loss"] == expected["train_loss"], "the same ranks until then"
        assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=LOSS_AFTER_FIVE_STEPS)
