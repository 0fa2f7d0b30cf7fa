"""The table of docs/training.md, of what is left out, repeated, cut or repaired: every report appears."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.generate import _show
from sas_megatron.cli.main import cli
from sas_megatron.evaluation.model_source import find_model_source
from sas_megatron.evaluation.settings import TaskSettings
from sas_megatron.evaluation.task_options import check_options
from sas_megatron.scaling.study import runner
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.plan import Plan
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.conftest import ROOT
from tests.docs.pages import read_table
from tests.end_to_end.test_stop_during_startup import TrainingInStartup
from tests.rank_pool import in_layout
from tests.scaling.study.studies import leave_run, write_study
from tests.small_data import SmallData
from tests.training.test_resuming import complete_and_log

HEADING = "| command | left out, repeated, cut or repaired | reported |"


def table_rows() -> list[tuple[str, str]]:
    """Return command and kind of each row of the table."""
    rows = read_table(ROOT / "docs" / "training.md", HEADING)
    return [(command, kind) for command, kind, _ in rows]


def stop_after_one_step(config: Any) -> list[str]:
    """Train on this rank until the time limit of 0 s; return the log lines."""
    from sas_megatron.fault_tolerance.stop_request import StopRequest
    from sas_megatron.training.loop import Run
    from sas_megatron.training.records import Console

    lines: list[str] = []
    log = Console.log
    Console.log = lambda _console, text: lines.append(text)  # type: ignore[method-assign]
    try:
        Run(config, in_layout(config.parallel), StopRequest(after_seconds=0.0)).complete()
    finally:
        Console.log = log  # type: ignore[method-assign]
    return lines


class Workspace:
    """A run that was stopped, damaged and resumed on two ranks, and a study."""

    def __init__(self, ranks: Any, small_data: SmallData, folder: Path) -> None:
        self.ranks, self.small_data, self.folder = ranks, small_data, folder
        self.run = folder / "run"

    def config(self, directory: Path, **sections: dict[str, Any]) -> Any:
        training = {"num_steps": 4, **sections.pop("training", {})}
        return self.small_data.run(
            directory,
            training=training,
            evaluation={"interval": 1},
            checkpoint={"resume": True},
            **sections,
        )

    @functools.cached_property
    def stopped(self) -> str:
        return "\n".join(self.ranks(1).run(stop_after_one_step, self.config(self.run))[0])

    @functools.cached_property
    def resumed(self) -> str:
        assert self.stopped
        checkpoints = self.run / "checkpoints"
        damaged = checkpoints / "iter_0000002"
        shutil.copytree(checkpoints / "iter_0000001", damaged)
        (damaged / "config.yaml").write_text("")
        with (self.run / "metrics.jsonl").open("ab") as file:
            file.write(b'{"kind": "train", "step": 2}\n{"kind": "tr\xff')
        (self.run / "config.yaml").unlink()
        record = json.loads((self.run / "run.json").read_text())
        (self.run / "run.json").write_text(json.dumps(record | {"sessions": []}))
        return "\n".join(self.ranks(2).run(complete_and_log, self.config(self.run))[0])

    @functools.cached_property
    def plan(self) -> Plan:
        folder = self.folder / "checkout" / "configs"
        folder.mkdir(parents=True)
        directory = folder.parent / "studies"
        return plan_with_rates(*load_study(write_study(folder, directory=str(directory))))


@pytest.fixture(scope="module")
def workspace(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(ranks, small_data, tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def report(
    workspace: Workspace,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    caplog.set_level(logging.INFO, logger="sas_megatron")
    return SimpleNamespace(space=workspace, log=caplog, output=capsys, monkeypatch=monkeypatch)


def check_skipped_update(report: Any) -> None:
    config = report.space.config(
        report.space.folder / "nan",
        optimizer={"learning_rate": 1e30, "clip_gradient_norm": 0},
        training={"num_steps": 20},
    )
    with pytest.raises(AssertionError, match=r"3 skipped in a row"):
        report.space.ranks(1).run(complete_and_log, config)
    text = (report.space.folder / "nan" / "metrics.jsonl").read_text()
    assert '"response": "skip"' in text
    assert "skipped_steps" in json.loads((report.space.run / "summary.json").read_text())["health"]


def check_tokenizer(report: Any) -> None:
    assert report.space.stopped
    tokenizer = report.space.small_data.tokenizer
    hidden = tokenizer.with_name("hidden.model")
    tokenizer.rename(hidden)
    try:
        find_model_source(report.space.run, iteration=1)
    finally:
        hidden.rename(tokenizer)
    assert (
        f"{tokenizer} is not the tokenizer of the run; its copy is used: {report.space.run}"
        in report.log.text
    )


def log_truncations() -> list[str]:
    """Return the messages about two truncated contexts. Runs on a rank, which has prepared Megatron-core."""
    from sas_megatron.evaluation import harness

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    harness.logger.addHandler(handler)
    try:
        found = SimpleNamespace(_num_truncated=2, max_length=40)
        harness.HarnessModel._log_truncations(found)  # type: ignore[arg-type]
    finally:
        harness.logger.removeHandler(handler)
    return messages


def check_tasks(report: Any) -> None:
    def task(**fields: Any) -> Any:
        split = SimpleNamespace(split=None)
        return SimpleNamespace(
            eval_docs=[1], fewshot_docs=lambda: [1, 2], fewshot_cfg=split, get_config=fields.get
        )

    tasks = {"whole": task(output_type="loglikelihood_rolling"), "words": task(output_type="loglikelihood")}
    check_options(tasks, TaskSettings(("whole", "words"), num_fewshot=1))
    assert "--num-fewshot has no effect on whole" in report.log.text
    text = "2 contexts do not fit into data.sequence_length=40; their first tokens are removed"
    assert report.space.ranks(1).run(log_truncations) == [[text]]


def check_generated_text(report: Any) -> None:
    completion = {"prompt": "a", "text": "b", "num_tokens": 1, "finish": "length"}
    cache = {"kind": None, "bytes_per_token_and_rank": 1}
    numbers = {"empty_prompts": 0, "step": 1, "seconds": 1.0, "tokens_per_second": 1.0}
    _show({"completions": [completion], "kv_cache": cache, **numbers})
    assert "1 tokens (length) by the model" in report.output.readouterr().err
    _show({"completions": [completion] * 2, "kv_cache": cache, **numbers})
    assert "--- 2 (length)" in report.output.readouterr().out


def check_waiting_runs(report: Any) -> None:
    plan, lines = report.space.plan, []
    names = frozenset(run.name for run in plan.runs if run.role == "trunk")
    study = runner.StudyRunner(lambda: plan, jobs=1, log=lines.append, excluded=names)
    assert not study.run(selected=lambda _run: True)
    assert lines[0].startswith(f"not started, since they have SLURM jobs: {len(names)} runs, first ")
    assert "runs are waiting, first " in lines[1]


def check_ended_run(report: Any) -> None:
    plan, lines = report.space.plan, []
    processes = SimpleNamespace(Popen=TrainingInStartup, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    report.monkeypatch.setattr(runner, "subprocess", processes)
    runner.StudyRunner(lambda: plan, jobs=1, log=lines.append).run(selected=lambda _run: True)
    assert lines[-1].endswith(": stopped with status -15 before it saved a checkpoint")


def check_collected_study(report: Any) -> None:
    plan = report.space.plan
    leave_run(plan.results[0])
    with (plan.results[0].directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    remarks = " ".join(collect(plan).remarks)
    assert "metrics.jsonl: the last line (2) is incomplete and was ignored." in remarks
    assert f"{len(plan.results) - 1} of {len(plan.results)} runs are missing: " in remarks


def check_found_study(report: Any) -> None:
    folder = report.space.folder / "found"
    (folder / "configs").mkdir(parents=True)
    path = write_study(folder / "configs", directory="studies")
    (folder / "studies" / "runs").mkdir(parents=True)
    report.monkeypatch.chdir(folder / "configs")
    done = CliRunner().invoke(cli, ["study", "status", str(path), "--json"])
    assert done.stderr == f"» the directory of the study is {folder}/studies\n"


def resumed(*texts: str) -> Callable[[Any], None]:
    def check(report: Any) -> None:
        for text in texts:
            assert text in report.space.resumed

    return check


def check_postponed_evaluation(report: Any) -> None:
    text = "stopping after step 1: stop_after_seconds; the evaluation after it is left to the resumed run"
    assert text in report.space.stopped


CHECKS: dict[tuple[str, str], Callable[[Any], None]] = {
    ("`train`", "records after the checkpoint that is resumed, whose steps are repeated"): resumed(
        "metrics.jsonl: removed 1 records after step 1, which is resumed"
    ),
    ("`train`", "unreadable lines of `metrics.jsonl`"): resumed("metrics.jsonl: removed 1 unreadable lines"),
    ("`train`", "a missing or changed `config.yaml`, written again"): resumed(
        "config.yaml: is missing; it is written again, according to"
    ),
    ("`train`", "a missing `run.json`, or one without sessions, begun again"): resumed(
        "run.json: has no record of earlier sessions; a new one was begun"
    ),
    ("`train`", "a damaged checkpoint, for which the previous one is used"): resumed(
        "iter_0000002: is damaged: ", "; trying the previous checkpoint"
    ),
    ("`train`", "random states that another layout cannot use"): resumed(
        "random states are not restored; this run uses no dropout"
    ),
    ("`train`", "an evaluation that a stop leaves to the resumed run"): check_postponed_evaluation,
    ("`train`", "a skipped update"): check_skipped_update,
    (
        "`evaluate`, `generate`",
        "another tokenizer at the path of the config, or none: the run's copy is used",
    ): check_tokenizer,
    (
        "`evaluate`",
        "contexts cut to `data.sequence_length`; tasks that take no examples",
    ): check_tasks,
    ("`generate`", "text that a limit or a stop string ends"): check_generated_text,
    ("`study run`", "runs that wait, or that have SLURM jobs"): check_waiting_runs,
    ("`study run`", "a run that a signal ends before it has saved"): check_ended_run,
    ("`study status`", "the directory of the study, found outside the working directory"): check_found_study,
    ("`study collect`", "missing and diverged runs; an incomplete last record"): check_collected_study,
}


def test_every_row_of_the_table_has_a_check() -> None:
    assert list(CHECKS) == table_rows()


@pytest.mark.parametrize("row", CHECKS, ids=" ".join)
def test_the_report_of_each_row_appears(report: SimpleNamespace, row: tuple[str, str]) -> None:
    CHECKS[row](report)
