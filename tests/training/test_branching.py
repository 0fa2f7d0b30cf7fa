"""Branches: runs of several lengths that share their steps until the shortest begins to decay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.training import entry
from tests.selection import cases
from tests.small_data import SmallData
from tests.training.test_runs import assert_same_final_state, complete, records

DECAYS = {"kind": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 3, "final_fraction": 0.0}


def branch_config(small_data: SmallData, directory: Path, **sections: dict[str, Any]) -> RunConfig:
    training = {"num_steps": 7, "order_steps": 12, **sections.pop("training", {})}
    schedule = sections.pop("schedule", DECAYS)
    model = {"hidden_dropout": 0.1}
    evaluation = {"interval": 3}
    return small_data.run(
        directory, training=training, schedule=schedule, model=model, evaluation=evaluation, **sections
    )


def trunk_config(small_data: SmallData, directory: Path, **sections: dict[str, Any]) -> RunConfig:
    return branch_config(
        small_data,
        directory,
        training={"num_steps": 9},
        schedule={"kind": "constant", "warmup_steps": 2},
        checkpoint={"at_steps": [4, 9]},
        **sections,
    )


def checkpoint_path(config: RunConfig, step: int) -> str:
    return str(Path(config.logging.run_directory) / "checkpoints" / f"iter_{step:07d}")


def without_times(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    timed = ("elapsed_seconds", "step_seconds", "tokens_per_second")
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in records(config, kind)
    ]


def forget_schema(path: Path) -> None:
    """Change run.json to schema 1, in which neither the file nor a session has a number."""
    record = json.loads(path.read_text())
    for entry_of_run in (record, *record["sessions"]):
        del entry_of_run["schema"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("num_steps", cases([7, 12], default=[7]))
def test_a_branch_equals_a_run_that_makes_all_steps_itself(
    ranks: Any, small_data: SmallData, tmp_path: Path, num_steps: int
) -> None:
    trunk = trunk_config(small_data, tmp_path / "trunk")
    ranks(2).run(complete, trunk)
    forget_schema(tmp_path / "trunk" / "run.json")
    training = {"num_steps": num_steps}
    unbranched = branch_config(small_data, tmp_path / "unbranched", training=training)
    ranks(2).run(complete, unbranched)
    branched = branch_config(
        small_data,
        tmp_path / "branched",
        training={**training, "stop_after_steps": num_steps - 1},
        checkpoint={"branch_from": checkpoint_path(trunk, num_steps - 3), "resume": True},
    )
    entry.check_run(branched, world_size=2)
    ranks(2).run(complete, branched)
    # The branch is resumed from its own checkpoint, without the trunk.
    (tmp_path / "trunk").rename(tmp_path / "elsewhere")
    resumed = branched.replaced({"training.stop_after_steps": None})
    entry.check_run(resumed, world_size=2)
    ranks(2).run(complete, resumed)
    assert_same_final_state(resumed, unbranched)
    assert without_times(resumed, "train") == without_times(unbranched, "train")
    # A run also evaluates at its last step. The trunk and the first session of the branch did so.
    expected = {record["step"]: record for record in without_times(unbranched, "validation")}
    found = {record["step"]: record for record in without_times(resumed, "validation")}
    assert {step: found[step] for step in expected} == expected
    sessions = json.loads((tmp_path / "branched" / "run.json").read_text())["sessions"]
    assert [session["branched_from"] for session in sessions] == [checkpoint_path(trunk, num_steps - 3), None]


def test_a_branch_from_an_incompatible_run_is_refused(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    trunk = trunk_config(small_data, tmp_path / "trunk")
    ranks(1).run(complete, trunk)

    def check_refused(
        checkpoint: str, error: type[Exception], message: str, **sections: dict[str, Any]
    ) -> None:
        config = branch_config(
            small_data, tmp_path / "new", checkpoint={"branch_from": checkpoint}, **sections
        )
        with pytest.raises(error, match=message):
            entry.check_run(config, world_size=1)
        assert not (tmp_path / "new").exists()

    path = re.escape(checkpoint_path(trunk, 4))
    check_refused(
        checkpoint_path(trunk, 4), FieldError, r"training\.seed=5: was 1234 in the run", training={"seed": 5}
    )
    check_refused(
        checkpoint_path(trunk, 4),
        FieldError,
        rf"training\.order_steps=13: the samples of {path} are in the order of a run of 12 steps; set",
        training={"order_steps": 13},
    )
    check_refused(
        checkpoint_path(trunk, 4),
        FieldError,
        r"schedule\.kind=cosine: the learning rate of the run at step 4 depends on",
        schedule={"kind": "cosine", "warmup_steps": 2},
    )
    check_refused(
        checkpoint_path(trunk, 9),
        FieldError,
        r"schedule\.decay_steps=3: the run decays its learning rate from step 4 on, before the branch",
    )
    check_refused(
        checkpoint_path(trunk, 4),
        FieldError,
        r"schedule\.warmup_steps=1: was 2 in the run",
        schedule={**DECAYS, "warmup_steps": 1},
    )
    check_refused(checkpoint_path(trunk, 5), FileProblem, "is not a folder; name a checkpoint")
    (tmp_path / "trunk" / "metrics.jsonl").unlink()
    check_refused(
        checkpoint_path(trunk, 4), FileProblem, r"metrics\.jsonl: is missing, and a branch needs it"
    )
