"""`sas-megatron evaluate` and `generate` in one process and on two ranks."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.data.corpus import builtin_corpus
from sas_megatron.data.documents import stream_documents
from tests import small_attentions as small
from tests.cli.test_commands import command
from tests.data.preparing import prepare_two_documents
from tests.evaluation.local_tasks import NUM_DOCUMENTS, write_tasks
from tests.evaluation.trained_runs import TrainedRun, train_and_export
from tests.fork_server import ROOT, ForkedCommand, run_command
from tests.small_data import SmallData


@pytest.fixture(scope="module")
def run(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_and_export(ranks, small_data, tmp_path_factory.mktemp("run"), small.SAS)


def test_evaluate_writes_the_validation_loss_to_the_summary(run: TrainedRun, tmp_path: Path) -> None:
    done = run_command("evaluate", run.directory, "--sequence-length", "40", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation" in done.stdout
    written = json.loads((run.directory / "evaluation" / "iter_0000012" / "summary.json").read_text())
    (at_length,) = written["validation"]["by_length"]
    trained = json.loads((run.directory / "summary.json").read_text())
    assert at_length["all"]["loss"] == pytest.approx(trained["final_validation_loss"], rel=1e-6)


def test_evaluate_refuses_data_without_validation_documents(
    run: TrainedRun, small_data: SmallData, tmp_path: Path
) -> None:
    prefix = prepare_two_documents(small_data, tmp_path)
    overrides = [f"data.prefixes=[{prefix}]", "data.split=[0.97,0.03]"]
    done = run_command("evaluate", run.directory, *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert f"leaves no validation documents of {prefix}, which has 2 documents; use" in done.stderr


def test_generate_continues_prompts_and_prints_the_cache_size(run: TrainedRun, tmp_path: Path) -> None:
    options = ["--prompt", "import os", "--prompt", "def main(", "--max-new-tokens", "5"]
    # A new interpreter, because the device must be prepared before Megatron-core is imported.
    done = command("generate", run.directory, "attention.kv_cache=simulated", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "import os" in done.stdout
    # Two layers with 12 simulated heads of 10 and 6 features in float32.
    assert f"{2 * 12 * (10 + 6) * 4:,} bytes per token and rank (attention.kv_cache=simulated)" in done.stderr


def complete_on_ranks(
    world_size: int, arguments: list[Any], *, environment: dict[str, str], cwd: Path = ROOT
) -> list[ForkedCommand]:
    """Run a command on ranks, with the environment of torchrun, and check that it succeeds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    launched = {**environment, **rendezvous, "WORLD_SIZE": str(world_size)}
    commands = [
        ForkedCommand(
            *arguments, environment={**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=cwd
        )
        for rank in range(world_size)
    ]
    try:
        for command in commands:
            assert command.wait(240) == 0, command.errors()
    finally:
        for command in commands:
            command.kill()
    return commands


def test_two_processes_run_local_tasks_and_write_the_files_of_the_harness(
    run: TrainedRun, tmp_path: Path
) -> None:
    texts = list(stream_documents([builtin_corpus(tmp_path, max_bytes=200_000)]))
    tasks = write_tasks(tmp_path / "tasks", texts)
    arguments = [
        *("evaluate", run.directory, "--tasks", "next_line,last_*", "--include-path", tasks, "--limit", 3),
        *("--cache", "--output", tmp_path / "results", "--json", "parallel.tensor=2"),
    ]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    first, second = complete_on_ranks(2, arguments, environment={**os.environ, **offline})
    assert second.output() == "", "only rank 0 prints the results"
    results = json.loads(first.output())["tasks"]
    assert results["num_samples"]["next_line"] == {"original": NUM_DOCUMENTS, "effective": 3}
    assert results["results"]["next_line"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    folder = tmp_path / "results" / "iter_0000012"
    for name in results["files"]:
        assert (folder / name).stat().st_size > 0
    assert len(list(folder.glob("samples_last_word_*.jsonl"))) == 1
    assert len(list(folder.glob("answers_*_rank0.db"))) == 1
    assert json.loads((folder / "summary.json").read_text())["tasks"]["results"] == results["results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--limit", "3"],
            r"--limit=3\.0: applies only to --tasks, but this command evaluates the loss on the validation",
        ),
        (
            ["--cache", "--files", "builtin"],
            "--cache=True: applies only to --tasks, but this command evaluates --files;",
        ),
        (
            ["--stride", "3"],
            "--stride=3: applies only to --files, but this command evaluates the loss on the validation",
        ),
        (
            ["--tasks", "any", "--sequence-length", "9"],
            r"--sequence-length=\(9,\): applies only to --files or the loss",
        ),
        (
            ["--tasks", "any", "--files", "any"],
            "--files=.*: applies only to --files, but this command evaluates --tasks",
        ),
    ],
)
def test_options_without_effect_are_rejected(arguments: list[str], message: str) -> None:
    from sas_megatron.cli.evaluate import _check_options, evaluate
    from sas_megatron.config.errors import FieldError

    with pytest.raises(FieldError, match=message):
        _check_options(evaluate.make_context("evaluate", ["run", *arguments]))


def test_a_path_that_contains_an_equals_sign_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sas_megatron.cli.evaluate import _find_files

    monkeypatch.chdir(tmp_path)
    for folder in ("lang=en", "a=b=c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part-0.jsonl").write_text('{"text": "some text"}\n')
    given = ("lang=en/part-0.jsonl", "french=a=b=c/part-0.jsonl", "lang=en")
    found = _find_files(given, text_column="text")
    assert {name: [str(file.path) for file in files] for name, files in found.items()} == {
        "part-0.jsonl": ["lang=en/part-0.jsonl"],
        "french": ["a=b=c/part-0.jsonl"],
        "lang=en": ["lang=en/part-0.jsonl"],
    }


def test_empty_names_and_missing_files_are_rejected() -> None:
    from sas_megatron.cli.evaluate import _find_files
    from sas_megatron.config.errors import UserError
    from sas_megatron.evaluation.settings import TaskSettings

    with pytest.raises(UserError, match="--tasks='': is empty; give one or more"):
        TaskSettings(names=())
    with pytest.raises(UserError, match="--files='domain=': contains no path; name one"):
        _find_files(("domain=",), text_column="text")
    with pytest.raises(UserError, match=r"lost\.txt: does not exist"):
        _find_files(("one=builtin", "two=lost.txt"), text_column="text")
