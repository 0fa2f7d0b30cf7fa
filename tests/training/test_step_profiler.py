"""Traces of chosen steps: of every rank, of these steps alone, and without a mark on the run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

from tests.small_data import SmallData
from tests.training.test_runs import assert_same_final_state, complete


def traced_steps(path: Path) -> set[str]:
    """The steps in a trace, after a look at what else must be there."""
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert {"aten::embedding", "aten::convolution"} < names, "the forward pass"
    assert any("all_reduce" in name for name in names), "collectives"
    return {name for name in names if re.fullmatch(r"step \d+", name)}


def test_every_rank_leaves_a_trace_of_these_steps_alone_and_the_run_is_the_same(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "parallel": {"tensor": 2, "sequence": True},
        "model": {"hidden_dropout": 0.1},
        "attention": {"dropout": 0.1},
        "evaluation": {"interval": None},
    }
    training = {"num_steps": 5, "micro_batch_size": 8}
    plain = small_data.run(tmp_path / "plain", **sections, training=training)
    ranks(2).run(complete, plain)
    profiled = {**sections, "logging": {"profile_steps": [2, 5]}}
    stopped = small_data.run(tmp_path / "profiled", **profiled, training={**training, "stop_after_steps": 3})
    ranks(2).run(complete, stopped)
    rest = small_data.run(tmp_path / "profiled", **profiled, training=training, checkpoint={"resume": True})
    ranks(2).run(complete, rest)

    traces = {path.name: traced_steps(path) for path in (tmp_path / "profiled" / "profile").iterdir()}
    assert traces == {
        "rank_00000_steps_2_to_3.json.gz": {"step 2", "step 3"},
        "rank_00001_steps_2_to_3.json.gz": {"step 2", "step 3"},
        "rank_00000_steps_4_to_5.json.gz": {"step 4", "step 5"},
        "rank_00001_steps_4_to_5.json.gz": {"step 4", "step 5"},
    }
    assert not (tmp_path / "plain" / "profile").exists()
    assert_same_final_state(rest, plain)
