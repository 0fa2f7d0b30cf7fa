"""Elastic training (NNODES=1:2): when nodes leave or join, the run resumes from its checkpoint."""

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

# torch's defaults: an agent counts as lost after 15 s, and agents wait another 30 s for others to join.
CHANGE_SECONDS = 240


def config_of(small_data: SmallData, directory: Path, **training: Any) -> RunConfig:
    return small_data.run(
        directory,
        training={"num_steps": 5000, "micro_batch_size": 2, **training},
        # With a low learning rate, rounding differences stay small over some hundred steps.
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
    """Return the world size and the resumed step of each session."""
    path = run_directory / "run.json"
    entries = json.loads(path.read_text())["sessions"] if path.exists() else []
    return [(session["world_size"], session["from_step"]) for session in entries]


@pytest.mark.exhaustive
def test_a_run_continues_when_a_node_leaves_and_returns(
    nodes: Nodes, ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    run_directory, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(dump_yaml(config_of(small_data, run_directory)))
    variables = {"NNODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "MAX_RESTARTS": "3"}

    def start_node(rank: str) -> None:
        command = ("launch/torchrun.sh", "1", str(path), "checkpoint.resume=true")
        nodes.start(*command, **variables, NODE_RANK=rank, JOIN_SECONDS="200")

    def wait_for_session(number: int, num_ranks: int) -> None:
        """Wait for the session and for steps in it, after which a checkpoint exists."""
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
    elastic = config_of(small_data, run_directory, stop_after_steps=last)
    undisturbed = config_of(small_data, tmp_path / "undisturbed", stop_after_steps=last)
    ranks(2).run(complete, undisturbed)
    assert steps(run_directory) == list(range(1, last + 1)), "each step once"
    (_, step_of_leaving), (_, step_of_return) = sessions(run_directory)[1:]
    assert 0 < step_of_leaving < step_of_return < last
    for actual, expected in zip(records(elastic), records(undisturbed), strict=True):
        assert actual["consumed_samples"] == expected["consumed_samples"]
        if actual["step"] <= step_of_leaving:
            assert actual["train_loss"] == expected["train_loss"], "the layout is the same until then"
        assert actual["train_loss"] == pytest.approx(expected["train_loss"], abs=LOSS_AFTER_FIVE_STEPS)
