"""Resume at another layout or after damage to a checkpoint; start from the weights of another run."""

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
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.token_files import load_manifest, name_token_files
from sas_megatron.training import entry
from sas_megatron.training.resuming import check_resumable
from sas_megatron.training.run_files import RunFiles
from tests.small_data import SmallData
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.test_runs import assert_same_final_state, complete, records, summary
from tests.training.training_runs import complete_with_callback


def complete_and_log(config: RunConfig) -> list[str]:
    """Complete a run on this rank and return its log lines."""
    from sas_megatron.training.records import Console

    lines: list[str] = []
    log = Console.log
    Console.log = lambda _console, text: lines.append(text)  # type: ignore[method-assign]
    try:
        complete(config)
    finally:
        Console.log = log  # type: ignore[method-assign]
    return lines


# World size and sections. Each session resumes from the checkpoint of the previous one.
SESSIONS: list[tuple[int, dict[str, Any]]] = [
    (4, {"parallel": {"tensor": 2, "sequence": True}, "optimizer": {"distributed": True}}),
    (1, {"parallel": {}, "optimizer": {}}),
    (2, {"parallel": {"pipeline": 2}, "optimizer": {"distributed": True}}),
    (2, {"parallel": {"context": 2}, "training": {"micro_batch_size": 1, "recompute": "full"}}),
]


def test_a_run_resumed_at_other_layouts_has_the_losses_of_one_layout(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    steps = len(SESSIONS) + 1  # the last session makes two

    def run(name: str, **sections: dict[str, Any]) -> RunConfig:
        training = {"num_steps": steps, "micro_batch_size": 2, **sections.pop("training", {})}
        return small_data.run(tmp_path / name, training=training, evaluation={"interval": None}, **sections)

    uninterrupted = run("uninterrupted")
    ranks(1).run(complete, uninterrupted)
    for index, (world_size, sections) in enumerate(SESSIONS):
        training = {**sections.get("training", {}), "stop_after_steps": index + 1 + index // 3}
        session = run("resumed", **{**sections, "training": training}, checkpoint={"resume": True})
        entry.check_run(session, world_size=world_size)
        by_rank = ranks(world_size).run(complete_and_log, session)
        assert [any("random states are not restored" in line for line in lines) for lines in by_rank] == [
            index > 0
        ] * world_size
    assert [record["step"] for record in records(session)] == list(range(1, steps + 1))
    for key in ("consumed_samples", "learning_rate"):
        assert [record[key] for record in records(session)] == [
            record[key] for record in records(uninterrupted)
        ]
    losses = [
        [record["train_loss"] for record in records(config)] + [summary(config)["final_validation_loss"]]
        for config in (session, uninterrupted)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_AFTER_FIVE_STEPS)


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_previous_one_bit_identically(
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

    uninterrupted = run("uninterrupted", checkpoint={"asynchronous": True})
    ranks(2).run(complete, uninterrupted)
    ranks(2).run(complete, run("damaged", training={"stop_after_steps": 5}))
    newest, previous, _ = find_checkpoints(tmp_path / "damaged" / "checkpoints")
    (newest / "__0_0.distcp").write_bytes((newest / "__0_0.distcp").read_bytes()[:-1])
    damaged = run("damaged", checkpoint={"resume": True})
    for lines in ranks(2).run(complete_and_log, damaged):
        assert lines[0].startswith(f"{newest}: is damaged: __0_0.distcp has")
        assert lines[1] == f"resuming from {previous} at step 4"
    assert_same_final_state(damaged, uninterrupted)
    losses = [[record["train_loss"] for record in records(config)] for config in (damaged, uninterrupted)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_old_checkpoints_are_removed(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    config = small_data.run(
        tmp_path / "run",
        training={"num_steps": 9},
        checkpoint={"interval": 1, "keep_last": 2, "keep_every": 3},
    )
    ranks(1).run(complete, config)
    kept = find_checkpoints(RunFiles.checkpoints(config))
    assert [verify_checkpoint(path).step for path in kept] == [9, 8, 6, 3]


def test_a_new_run_starts_from_the_weights_of_another(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    first = small_data.run(tmp_path / "first", training={"num_steps": 4})
    ranks(1).run(complete, first)
    (path,) = find_checkpoints(RunFiles.checkpoints(first))
    for source in (path, path.parent):
        other = small_data.run(
            tmp_path / "other", model={"rotary_base": 500}, checkpoint={"initial_weights": str(source)}
        )
        with pytest.raises(
            FieldError, match=r"model\.rotary_base=500: must be 10000, as for the weights in .*0000004; set"
        ):
            entry.check_run(other, world_size=1)
    second = small_data.run(
        tmp_path / "second",
        training={"num_steps": 4, "engine": "deepspeed"},
        parallel={"tensor": 2},
        optimizer={"learning_rate": 1e-9},
        checkpoint={"initial_weights": str(tmp_path / "first")},
    )
    entry.check_run(second, world_size=2)
    ranks(2).run(complete, second)
    assert [record["step"] for record in records(second)] == [1, 2, 3, 4]
    assert summary(second)["final_validation_loss"] == pytest.approx(
        summary(first)["final_validation_loss"], rel=LOSS_AFTER_FIVE_STEPS
    )


def test_missing_initial_weights_are_reported_before_training(small_data: SmallData, tmp_path: Path) -> None:
    config = small_data.run(tmp_path / "run", checkpoint={"initial_weights": str(tmp_path / "nothing")})
    with pytest.raises(FileProblem, match=r"nothing: contains neither a checkpoint nor weights"):
        entry.check_run(config, world_size=1)


def test_deepspeeds_files_are_verified_and_refused_at_another_layout(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    def run(**sections: dict[str, Any]) -> RunConfig:
        training = {"num_steps": 4, "micro_batch_size": 2, "engine": "deepspeed"}
        return small_data.run(
            tmp_path / "run", training={**training, **sections.pop("training", {})}, **sections
        )

    ranks(2).run(complete, run(training={"stop_after_steps": 2}))
    (path,) = find_checkpoints(tmp_path / "run" / "checkpoints")
    names = [name for name in verify_checkpoint(path).files if name.startswith("deepspeed/")]
    assert len(names) == 3, names  # the model, and the optimizer states of each data rank
    with pytest.raises(AssertionError, match=r"DeepSpeed's files for another layout \(data 2 -> 1, w"):
        ranks(1).run(complete, run(checkpoint={"resume": True}))
    for name, number in itertools.product(names, (0, 1)):
        content = (path / name).read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1 << number
        (path / name).write_bytes(damaged)
        with pytest.raises(FileProblem, match=f"is damaged: {name} has contents that differ"):
            verify_checkpoint(path)
        (path / name).write_bytes(content)
    (path / "deepspeed" / "unlisted.pt").write_bytes(b"")
    with pytest.raises(AssertionError, match=r"deepspeed/unlisted.pt is not in manifest.json"):
        ranks(2).run(complete, run(checkpoint={"resume": True}))
    assert json.loads((path / "progress.json").read_text())["counts"]["consumed_samples"] == 16


def test_fields_that_affect_the_samples_must_not_change_on_resume(
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
        entry.check_run(other, world_size=2)


@pytest.fixture
def prefixes(small_data: SmallData, tmp_path: Path) -> list[str]:
    """Return the prefixes of different token files that end in the same name."""
    found = []
    for language, words in (("en", "one two three "), ("fr", "un deux trois ")):
        (tmp_path / f"{language}.txt").write_text(words * 5000)
        prefix = tmp_path / language / "tokens"
        sources = [tmp_path / f"{language}.txt"]
        prepare_token_files(sources, tokenizer_path=small_data.tokenizer, prefix=prefix, num_workers=1)
        found.append(str(prefix))
    return found


def test_token_files_that_end_in_one_name_are_recorded_and_compared_apart(
    small_data: SmallData, tmp_path: Path, prefixes: list[str]
) -> None:
    config = small_data.run(tmp_path / "run", data={"prefixes": prefixes}, checkpoint={"resume": True})
    manifests = {prefix: load_manifest(prefix) for prefix in prefixes}
    corpus = {name: manifests[prefix].model_dump() for prefix, name in name_token_files(prefixes).items()}
    assert list(corpus) == prefixes, "a base name is used only if it is unique"
    assert list(name_token_files(prefixes[:1]).values()) == ["tokens"]
    record = tmp_path / "run" / "run.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"corpus": corpus}))
    check_resumable(config)
    # Earlier versions recorded one of both, under the base name.
    record.write_text(json.dumps({"corpus": {"tokens": manifests[prefixes[1]].model_dump()}}))
    check_resumable(config)
    swapped = dict(zip(corpus, reversed(corpus.values()), strict=True))
    for wrong in (swapped, {"tokens": {**manifests[prefixes[0]].model_dump(), "bin_sha256": "0"}}, {}):
        record.write_text(json.dumps({"corpus": wrong}))
        with pytest.raises(FieldError, match=r"^data\.prefixes=.*en/tokens: differs from the tokens"):
            check_resumable(config)


def start_another_session(run: Any) -> None:
    """In the fourth step, change the run directory as rank 0 of another session of the run would."""
    from sas_megatron.data.epochs import count_data_use
    from sas_megatron.training.summary import describe_provenance

    if run.progress.step == 3:
        provenance = describe_provenance(run.config, run.topology, run.start, count_data_use(run.config))
        other_session = RunFiles(run.config)
        other_session.open(run.config, provenance, resumed_step=0)
        other_session.close()


@pytest.mark.parametrize("interval", [5, 100])
def test_a_session_replaced_by_another_ends_without_writing(
    ranks: Any, small_data: SmallData, tmp_path: Path, interval: int
) -> None:
    config = small_data.run(
        tmp_path / "run",
        training={"num_steps": 6},
        evaluation={"interval": None},
        checkpoint={"interval": interval, "resume": True},
    )
    with pytest.raises(AssertionError) as failure:
        ranks(2).run(complete_with_callback, config, 0, start_another_session)
    host = socket.gethostname()
    message = f"FileProblem: {tmp_path}/run/run.json: contains a newer session, started on {host} at"
    assert str(failure.value).count(message) == 2, "on both ranks"
    assert not list(RunFiles.checkpoints(config).glob("*"))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "", "the file belongs to the other session"
    # The other session does not run, so that this one can resume.
    ranks(2).run(complete, config)
    assert len(records(config)) == 6
