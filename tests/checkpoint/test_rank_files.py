"""A checkpoint that cannot be used is refused in words, on every rank alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.rank_files import find_newest_checkpoint, load_checkpoint, save_checkpoint
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout


def save(folder: Path) -> Path:
    topology = in_layout(ParallelConfig())
    state = {"weights": torch.arange(50.0) + topology.rank, "step": 7}
    return save_checkpoint(folder, step=7, capture=lambda _folder: state, topology=topology)


def load(path: Path, tensor: int = 1) -> tuple[str, Any]:
    topology = in_layout(ParallelConfig(tensor=tensor))
    try:
        return "state", load_checkpoint(path, topology)
    except FileProblem as problem:
        return "problem", str(problem)


@pytest.fixture
def checkpoint(ranks: Any, tmp_path: Path) -> Path:
    return ranks(2).run(save, tmp_path)[0]


def test_each_rank_gets_its_own_state_back(ranks: Any, checkpoint: Path) -> None:
    assert find_newest_checkpoint(checkpoint.parent) == checkpoint
    assert not list(checkpoint.parent.glob("*.partial"))
    for rank, (kind, state) in enumerate(ranks(2).run(load, checkpoint)):
        assert kind == "state"
        assert state["step"] == 7
        assert torch.equal(state["weights"], torch.arange(50.0) + rank)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def garble(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink])
def test_one_damaged_file_is_named_on_every_rank(
    ranks: Any, checkpoint: Path, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint / "rank_00001.pt")
    answers = ranks(2).run(load, checkpoint)
    assert answers[0] == answers[1]
    kind, message = answers[0]
    assert kind == "problem"
    assert "rank_00001.pt: is damaged (" in message
    assert message.endswith("remove that checkpoint to go on from the one before")


def test_a_bad_manifest_a_newer_format_and_another_layout_are_refused(ranks: Any, checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    whole = json.loads(manifest.read_text())
    for text, expected in (
        ("{", "has no readable manifest"),
        ("{}", "has no readable manifest"),
        (json.dumps({**whole, "schema": 99}), "has format 99, newer than 2; update the package"),
        (json.dumps({**whole, "schema": 1}), "has format 1, older than 2; go on with the version that"),
    ):
        manifest.write_text(text)
        assert all(expected in message for _, message in ranks(2).run(load, checkpoint))
    manifest.write_text(json.dumps(whole))
    for kind, message in ranks(2).run(load, checkpoint, 2):
        assert kind == "problem"
        assert "resume with the same number of ranks and parallel.* settings" in message
