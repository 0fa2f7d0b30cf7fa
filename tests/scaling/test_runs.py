"""Loading of run directories, and the check that runs are comparable."""

from __future__ import annotations

import json

import pytest

from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.scaling.runs import check_comparable, load_run
from tests.scaling.conftest import WriteRun, train_line, validation_line

LOSSES = {30: 5.5, 60: 4.75, 90: 4.625}


def test_run_has_both_curves_and_the_summary(write_run: WriteRun) -> None:
    run = load_run(write_run("mha", losses=LOSSES))
    assert run.name == "mha"
    assert [(point.step, point.loss) for point in run.validation_curve] == list(LOSSES.items())
    assert [point.step for point in run.train_curve] == list(range(10, 91, 10))
    assert run.validation_curve[1].consumed_tokens == 60 * 357
    assert run.summary.steps == 90
    assert run.provenance["corpus"] == "tales"
    assert run.config.model.ffn_hidden_size == 104
    assert run.remarks == ()


def test_missing_result_stays_missing(write_run: WriteRun) -> None:
    run = load_run(write_run("mha", losses={30: 5.5, 90: None}, summary={"peak_memory_bytes": None}))
    assert run.validation_curve[-1].loss is None
    assert run.summary.final_validation_loss is None
    assert run.summary.peak_memory_bytes is None
    assert run.summary.best_validation_loss is None


def test_incomplete_last_line_is_ignored_with_a_remark(write_run: WriteRun) -> None:
    directory = write_run("mha", losses=LOSSES)
    metrics = directory / "metrics.jsonl"
    whole = metrics.read_text().splitlines()
    metrics.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:40])
    run = load_run(directory)
    assert [point.step for point in run.validation_curve] == [30, 60]
    assert run.remarks == (f"{metrics}: the last line ({len(whole)}) is incomplete and was ignored.",)


def test_invalid_line_before_the_last_is_an_error_with_its_number(write_run: WriteRun) -> None:
    directory = write_run("mha", losses=LOSSES)
    metrics = directory / "metrics.jsonl"
    whole = metrics.read_text().splitlines()
    metrics.write_text("\n".join([whole[0], whole[1][:40], *whole[2:]]))
    with pytest.raises(FileProblem, match=r"metrics\.jsonl:2: invalid JSON.*; correct or remove the line"):
        load_run(directory)


def test_nan_is_refused(write_run: WriteRun) -> None:
    directory = write_run("mha", losses={30: float("nan"), 90: 4.0})
    with pytest.raises(FileProblem, match=r"validation_loss: input should be a finite number"):
        load_run(directory)


def test_skipped_updates_are_remarked_on(write_run: WriteRun) -> None:
    directory = write_run("mha", losses=LOSSES, summary={"health": {"skipped_steps": 2, "loss_spikes": 1}})
    metrics = directory / "metrics.jsonl"
    event = {"kind": "health", "step": 17, "event": "non_finite", "quantity": "loss", "response": "skip"}
    metrics.write_text(json.dumps(event) + "\n" + metrics.read_text())
    run = load_run(directory)
    remark = f"{directory / 'summary.json'}: the update of 2 steps was skipped (see `health`)."
    assert run.remarks == (remark,)
    assert [point.step for point in run.train_curve] == list(range(10, 91, 10))


def test_steps_logged_again_after_resuming_replace_the_earlier_records(write_run: WriteRun) -> None:
    directory = write_run("mha", losses=LOSSES)
    costs = {"flops_per_token": 1000.0, "step_seconds": 0.5}
    again = [train_line(70, 4.9, **costs), train_line(80, 4.8, **costs), validation_line(90, 4.5, **costs)]
    with (directory / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in again)
    run = load_run(directory)
    assert [(point.step, point.loss) for point in run.validation_curve] == [(30, 5.5), (60, 4.75), (90, 4.5)]
    assert [point.step for point in run.train_curve] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert run.train_curve[-2].loss == 4.9


def test_decreasing_time_is_an_error(write_run: WriteRun) -> None:
    directory = write_run("mha", losses=LOSSES)
    with (directory / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(validation_line(95, 4.5, flops_per_token=1000.0, step_seconds=0.25)) + "\n")
    with pytest.raises(
        FileProblem, match=r"elapsed_seconds decreases from 45\.0 at step 90 to 23\.75 at step 95"
    ):
        load_run(directory)


def test_missing_directory_is_refused(tmp_path) -> None:
    with pytest.raises(FileProblem, match=r"nowhere: is not a directory; give a run directory"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl"])
def test_missing_file_is_named_in_the_error(write_run: WriteRun, name: str) -> None:
    directory = write_run("mha", losses=LOSSES)
    (directory / name).unlink()
    with pytest.raises(FileProblem, match=rf"{name}: is missing; give a run directory"):
        load_run(directory)


def test_unfinished_run_is_refused_with_a_remedy(write_run: WriteRun) -> None:
    stopped = write_run("stopped", losses=LOSSES, summary={"exit_reason": "signal", "steps": 41})
    with pytest.raises(
        FileProblem, match=r"stopped at step 41 \(exit_reason: signal\).*checkpoint.resume=true"
    ):
        load_run(stopped)
    (stopped / "summary.json").unlink()
    with pytest.raises(FileProblem, match=r"is missing, so the run has not finished; resume it with"):
        load_run(stopped)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", r"run\.json: is not JSON"),
        ("run.json", "[1]", r"run\.json: is not a JSON object"),
        ("summary.json", "{", r"summary\.json: invalid JSON"),
        ("summary.json", '{"exit_reason": "finished", "steps": 3}', r"summary\.json: tokens: field required"),
        (
            "config.yaml",
            "model: {}",
            r"config\.yaml: is not a valid config .*model\.num_layers: is required",
        ),
    ],
)
def test_invalid_file_is_refused(write_run: WriteRun, name: str, text: str, message: str) -> None:
    directory = write_run("mha", losses=LOSSES)
    (directory / name).write_text(text)
    with pytest.raises(FileProblem, match=rf"(?s){message}"):
        load_run(directory)


def test_attention_mlp_width_and_directory_may_differ(write_run: WriteRun) -> None:
    changed = {"attention__kind": "gqa", "attention__num_kv_heads": 2, "model__ffn_hidden_size": 112}
    resumed = {"checkpoint__resume": True}
    runs = [write_run("mha", losses=LOSSES), write_run("gqa", losses=LOSSES, config=changed | resumed)]
    check_comparable([load_run(run) for run in runs])


def test_other_differences_are_listed_with_their_values(write_run: WriteRun) -> None:
    other = {"training__seed": 77, "data__prefixes": ["corpora/laws"], "model__ffn_hidden_size": 112}
    runs = [
        load_run(write_run("mha", losses=LOSSES)),
        load_run(write_run("other", losses=LOSSES, config=other, provenance={"world_size": 3})),
    ]
    with pytest.raises(UserError) as caught:
        check_comparable(runs)
    assert str(caught.value) == (
        "these runs differ in fields other than attention and model.ffn_hidden_size, so that a comparison "
        "would not be fair; train them again with equal values of\n"
        "  data.prefixes: mha ['corpora/tales'], other ['corpora/laws']\n"
        "  training.seed: mha 1234, other 77\n"
        "  run.json world_size: mha 1, other 3"
    )


def test_single_run_or_duplicate_names_are_refused(write_run: WriteRun) -> None:
    run = load_run(write_run("mha", losses=LOSSES))
    with pytest.raises(UserError, match="needs two or more"):
        check_comparable([run])
    with pytest.raises(UserError, match="two runs are named mha"):
        check_comparable([run, run])
