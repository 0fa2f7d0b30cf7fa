"""Traces of chosen steps: every rank writes one, and profiling does not change the run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

from tests.small_data import SmallData
from tests.training.test_runs import assert_same_final_state, complete


def traced_steps(path: Path) -> set[str]:
    """Check that a trace contains the model and collectives, and return its steps."""
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert {"aten::embedding", "aten::convolution"} < names, "the forward pass"
    assert any("all_reduce" in name for name in names), "collectives"
    return {name for name in names if re.fullmatch(r"step \d+", name)}


def test_every_rank_traces_only_the_chosen_steps_and_the_run_does_not_change(
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
    resumed = small_data.run(
        tmp_path / "profiled", **profiled, training=training, checkpoint={"resume": True}
    )
    ranks(2).run(complete, resumed)

    traces = {path.name: traced_steps(path) for path in (tmp_path / "profiled" / "profile").iterdir()}
    assert traces == {
        "rank_00000_steps_2_to_3.json.gz": {"step 2", "step 3"},
        "rank_00001_steps_2_to_3.json.gz": {"step 2", "step 3"},
        "rank_00000_steps_4_to_5.json.gz": {"step 4", "step 5"},
        "rank_00001_steps_4_to_5.json.gz": {"step 4", "step 5"},
    }
    assert not (tmp_path / "plain" / "profile").exists()
    assert_same_final_state(resumed, plain)
