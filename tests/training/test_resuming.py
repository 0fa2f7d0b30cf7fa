"""Going on elsewhere than one stopped: other layouts, damaged checkpoints, other runs' weights."""

from __future__ import annotations

import itertools
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.checkpoint.manifest import find_checkpoints, verify_checkpoint
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.training import start
from sas_megatron.training.run_files import RunFiles
from tests.small_data import SmallData
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.test_runs import assert_end_alike, complete, records, summary
from tests.training.training_runs import complete_disturbed


def complete_and_listen(config: RunConfig) -> list[str]:
    """On a rank: the run, and what it said."""
    from sas_megatron.training.console import Console

    said: list[str] = []
    kept = Console.say
    Console.say = lambda _console, text: said.append(text)  # type: ignore[method-assign]
    try:
        complete(config)
    finally:
        Console.say = kept  # type: ignore[method-assign]
    return said


# Ranks, and how they share the work; each in turn goes on from the files of the one before.
RELAY: list[tuple[int, dict[str, Any]]] = [
    (4, {"parallel": {"tensor": 2, "sequence": True}, "optimizer": {"distributed": True}}),
    (1, {"parallel": {}, "optimizer": {}}),
    (2, {"parallel": {"pipeline": 2}, "optimizer": {"distributed": True}}),
    (2, {"parallel": {"context": 2}, "training": {"micro_batch_size": 1, "recompute": "full"}}),
]


def test_a_run_handed_from_layout_to_layout_is_one_run(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    steps = len(RELAY) + 1  # the last takes two

    def run(name: str, **sections: dict[str, Any]) -> RunConfig:
        training = {"num_steps": steps, "micro_batch_size": 2, **sections.pop("training", {})}
        return small_data.run(tmp_path / name, training=training, evaluation={"interval": None}, **sections)

    whole = run("whole")
    ranks(1).run(complete, whole)
    for index, (world_size, sections) in enumerate(RELAY):
        training = {**sections.get("training", {}), "stop_after_steps": index + 1 + index // 3}
        leg = run("relay", **{**sections, "training": training}, checkpoint={"resume": True})
        start.check(leg, world_size=world_size)
        said = ranks(world_size).run(complete_and_listen, leg)
        assert [any("random states are not restored" in line for line in lines) for lines in said] == [
            index > 0
        ] * world_size
    assert [record["step"] for record in records(leg)] == list(range(1, steps + 1))
    for key in ("consumed_samples", "learning_rate"):
        assert [record[key] for record in records(leg)] == [record[key] for record in records(whole)]
    losses = [
        [record["train_loss"] for record in records(config)] + [summary(config)["final_validation_loss"]]
        for config in (leg, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_AFTER_FIVE_STEPS)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_nothing_had_been(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    def run(name: str, **sections: dict[str, Any]) -> RunConfig:
        checkpoint = {"interval": 2, **sections.pop("checkpoint", {})}
        training = {"num_steps": 6, **sections.pop("training", {})}
        return small_data.run(
            tmp_path / name,
            training=training,
            checkpoint=checkpoint,
            model={"hidden_dropout": 0.1},
            **sections,
        )

    whole = run("whole", checkpoint={"asynchronous": True})
    ranks(2).run(complete, whole)
    ranks(2).run(complete, run("broken", training={"stop_after_steps": 5}))
    newest, before, _ = find_checkpoints(tmp_path / "broken" / "checkpoints")
    (newest / "__0_0.distcp").write_bytes((newest / "__0_0.distcp").read_bytes()[:-1])
    broken = run("broken", checkpoint={"resume": True})
    for said in ranks(2).run(complete_and_listen, broken):
        assert said[0].startswith(f"{newest}: is damaged: __0_0.distcp has")
        assert said[1] == f"going on from {before} at step 4"
    assert_end_alike(broken, whole)
    losses = [[record["train_loss"] for record in records(config)] for config in (broken, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_only_so_many_checkpoints_stay(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    config = small_data.run(
        tmp_path / "run",
        training={"num_steps": 9},
        checkpoint={"interval": 1, "keep_last": 2, "keep_every": 3},
    )
    ranks(1).run(complete, config)
    left = find_checkpoints(RunFiles.checkpoints(config))
    assert [verify_checkpoint(path).step for path in left] == [9, 8, 6, 3]


def test_a_new_run_begins_with_the_weights_of_another(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    first = small_data.run(tmp_path / "first", training={"num_steps": 4})
    ranks(1).run(complete, first)
    (path,) = find_checkpoints(RunFiles.checkpoints(first))
    for place in (path, path.parent):
        other = small_data.run(
            tmp_path / "other", model={"rotary_base": 500}, checkpoint={"initial_weights": str(place)}
        )
        with pytest.raises(
            FieldError, match=r"model\.rotary_base=500: must be 10000, as for the weights in .*0000004; set"
        ):
            start.check(other, world_size=1)
    second = small_data.run(
        tmp_path / "second",
        training={"num_steps": 4, "engine": "deepspeed"},
        parallel={"tensor": 2},
        optimizer={"learning_rate": 1e-9},
        checkpoint={"initial_weights": str(tmp_path / "first")},
    )
    start.check(second, world_size=2)
    ranks(2).run(complete, second)
    assert [record["step"] for record in records(second)] == [1, 2, 3, 4]
    assert summary(second)["final_validation_loss"] == pytest.approx(
        summary(first)["final_validation_loss"], rel=LOSS_AFTER_FIVE_STEPS
    )


def test_initial_weights_that_are_not_there_are_missed_before_training(
    small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(tmp_path / "run", checkpoint={"initial_weights": str(tmp_path / "nothing")})
    with pytest.raises(FileProblem, match=r"nothing: contains neither a checkpoint nor weights"):
        start.check(config, world_size=1)


def test_deepspeeds_own_files_are_checked_and_bound_to_their_layout(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    def run(**sections: dict[str, Any]) -> RunConfig:
        training = {"num_steps": 4, "micro_batch_size": 2, "engine": "deepspeed"}
        return small_data.run(
            tmp_path / "run", training={**training, **sections.pop("training", {})}, **sections
        )

    ranks(2).run(complete, run(training={"stop_after_steps": 2}))
    (path,) = find_checkpoints(tmp_path / "run" / "checkpoints")
    own = [name for name in verify_checkpoint(path).files if name.startswith("deepspeed/")]
    assert len(own) == 3, own  # the model's, and each data rank's part of the optimizer's
    with pytest.raises(AssertionError, match=r"DeepSpeed's files for another layout \(data 2 -> 1, w"):
        ranks(1).run(complete, run(checkpoint={"resume": True}))
    for name, number in itertools.product(own, (0, 1)):
        content = (path / name).read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1 << number
        (path / name).write_bytes(damaged)
        with pytest.raises(FileProblem, match=f"is damaged: {name} has contents that differ"):
            verify_checkpoint(path)
        (path / name).write_bytes(content)
    assert json.loads((path / "progress.json").read_text())["counts"]["consumed_samples"] == 16


def test_what_decides_the_samples_may_not_change_with_the_layout(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    ranks(1).run(complete, small_data.run(tmp_path / "run", training={"num_steps": 4}))
    other = small_data.run(
        tmp_path / "run",
        parallel={"tensor": 2},
        training={"num_steps": 4, "global_batch_size": 16},
        checkpoint={"resume": True},
    )
    with pytest.raises(FieldError, match=r"training\.global_batch_size=16: was 8 in the run"):
        start.check(other, world_size=2)


def begin_another_session(run: Any) -> None:
    """What the first rank of the same run, started elsewhere, does to the files in the fourth step."""
    if run.progress.step == 3:
        elsewhere = RunFiles(run.config)
        elsewhere.open(run.config, run._provenance(), resumed_step=0)
        elsewhere.close()


@pytest.mark.parametrize("interval", [5, 100])
def test_a_session_whose_run_was_taken_over_ends_and_leaves_the_files_alone(
    ranks: Any, small_data: SmallData, tmp_path: Path, interval: int
) -> None:
    config = small_data.run(
        tmp_path / "run",
        training={"num_steps": 6},
        evaluation={"interval": None},
        checkpoint={"interval": interval, "resume": True},
    )
    with pytest.raises(AssertionError) as failure:
        ranks(2).run(complete_disturbed, config, 0, begin_another_session)
    says = f"FileProblem: {tmp_path}/run/run.json: tells of a session that began on {socket.gethostname()} at"
    assert str(failure.value).count(says) == 2, "on both ranks"
    assert not list(RunFiles.checkpoints(config).glob("*"))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "", "it is the other's"
    # Nobody else is there: the run goes on.
    ranks(2).run(complete, config)
    assert len(records(config)) == 6
