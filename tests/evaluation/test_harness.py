"""lm-evaluation-harness: every answer agrees with that of its `hf` model on the export."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.data.corpus import builtin_corpus
from sas_megatron.data.documents import stream_documents
from tests import small_attentions as small
from tests.evaluation.local_tasks import NAMES, NUM_DOCUMENTS, write_tasks
from tests.evaluation.trained_runs import TrainedRun, load_on_rank, train_and_export
from tests.selection import exhaustive
from tests.small_data import SmallData
from tests.tolerances import RELATIVE_ERROR

Samples = dict[str, list[dict[str, Any]]]


# Tasks that fail while they run: by name, the change of `last_word`.
FAULTY_TASKS = {
    "too_many": ("output_type:", "num_fewshot: 100\noutput_type:"),
    "too_many_first": ("output_type:", "num_fewshot: 100\nfewshot_config: {sampler: first_n}\noutput_type:"),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write task files. The harness stores its data sets next to them, without downloads."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    corpus = builtin_corpus(folder, max_bytes=200_000)
    written = write_tasks(folder / "tasks", list(stream_documents([corpus])))
    text = (written / "last_word.yaml").read_text(encoding="utf-8")
    without_data = text.replace("task: last_word", "task: lost").replace("last_word.jsonl", "nowhere.jsonl")
    (written / "lost.yaml").write_text(without_data, encoding="utf-8")
    for name, (old, new) in FAULTY_TASKS.items():
        changed = text.replace("task: last_word", f"task: {name}").replace(old, new)
        (written / f"{name}.yaml").write_text(changed, encoding="utf-8")
    return written


RUNS = {"sas": {**small.SAS_GROUPED, "head_expansion": 2}, "gqa": small.GQA}


@pytest.fixture(scope="module")
def trained(
    ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainedRun]:
    """Return a function that trains and exports a run of an attention."""
    return functools.cache(
        lambda name: train_and_export(ranks, small_data, tmp_path_factory.mktemp(name), RUNS[name])
    )


@pytest.fixture(scope="module")
def sas_run(trained: Callable[[str], TrainedRun]) -> Path:
    """Return the directory of a run with SAS."""
    return trained("sas").directory


def read_samples(folder: Path) -> Samples:
    """Return the samples of each task, sorted by document."""
    found: Samples = {}
    for name in NAMES:
        (path,) = folder.glob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[name] = sorted(lines, key=lambda sample: sample["doc_id"])
    return found


def evaluate_by_transformers(exported: Path, tasks: Path, folder: Path) -> None:
    """Evaluate an export with the harness's `hf` model and write its files to `folder`."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(folder.parent))
    model = HFLM(str(exported), device="cpu", dtype="float32", batch_size=3, trust_remote_code=True)
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"model": folder.name},
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, of_task in samples.items():
        tracker.save_results_samples(task_name=name, samples=of_task)


def evaluate_on_rank(
    directory: Path, tasks: Path, overrides: list[str], folder: Path, names: list[str] = NAMES
) -> dict[str, Any] | None:
    """Evaluate a run in the way of the command."""
    from sas_megatron.evaluation.settings import TaskSettings
    from sas_megatron.evaluation.tasks import evaluate_tasks, load_tasks

    model, _ = load_on_rank(directory, overrides)
    task_settings = TaskSettings(tuple(names), bootstrap_iterations=0, batch_tokens=150)
    loaded = load_tasks(task_settings.names, [tasks]) if model.topology.is_rank0 else None
    return evaluate_tasks(model, loaded, task_settings, folder=folder, cache=None)


@pytest.fixture(scope="module")
def transformers_samples(
    ranks: Any, trained: Callable[[str], TrainedRun], tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Samples]:
    """Return a function to the samples of the harness's `hf` model on the export of a run."""

    @functools.cache
    def evaluate(name: str) -> Samples:
        folder = tmp_path_factory.mktemp(name) / "hf"
        ranks(1).run(evaluate_by_transformers, trained(name).exported, tasks, folder)
        return read_samples(folder)

    return evaluate


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2", "attention.kv_cache=simulated"]),
    "data 2": (2, []),
}


@pytest.mark.parametrize(
    ("attention", "layout"),
    [*(("sas", layout) for layout in LAYOUTS), pytest.param("gqa", "one rank", marks=exhaustive)],
)
def test_answers_agree_with_the_hf_model_on_the_export(
    ranks: Any,
    trained: Callable[[str], TrainedRun],
    transformers_samples: Callable[[str], Samples],
    tasks: Path,
    tmp_path: Path,
    attention: str,
    layout: str,
) -> None:
    world_size, overrides = LAYOUTS[layout]
    folder = tmp_path / "native"
    results, *others = ranks(world_size).run(
        evaluate_on_rank, trained(attention).directory, tasks, overrides, folder
    )
    assert others == [None] * (world_size - 1)
    native = read_samples(folder)
    for name in NAMES:
        assert len(native[name]) == NUM_DOCUMENTS
        for actual, expected in zip(native[name], transformers_samples(attention)[name], strict=True):
            assert actual["doc"] == expected["doc"]
            assert_equal_answers(actual["filtered_resps"], expected["filtered_resps"])
    assert set(results["results"]) == set(NAMES)


def error_of_loading(names: list[str], folder: Path) -> str:
    """Return the message with which `load_tasks` fails. Runs on one rank."""
    from sas_megatron.config.errors import UserError
    from sas_megatron.evaluation.tasks import load_tasks

    try:
        load_tasks(names, [folder])
    except UserError as error:
        return str(error)
    raise AssertionError("the tasks were loaded")


def test_unknown_tasks_and_tasks_without_data_are_rejected(ranks: Any, tasks: Path, tmp_path: Path) -> None:
    (unknown, without_data, no_folder) = (
        ranks(1).run(error_of_loading, names, folder)[0]
        for names, folder in ((["next_lin"], tasks), (["lost"], tasks), (["lost"], tmp_path / "none"))
    )
    assert unknown.startswith("--tasks=next_lin: is not a task, group or tag of lm-eval ")
    assert "did you mean next_line" in unknown
    assert without_data.startswith("--tasks=lost: cannot be loaded with its data (FileNotFoundError: ")
    assert no_folder.startswith(f"{tmp_path / 'none'}: is not a folder; name")


def error_of_options(names: list[str], tasks: Path, settings: dict[str, Any]) -> str | None:
    """Return the error of checking options against tasks; None without any."""
    from sas_megatron.config.errors import UserError
    from sas_megatron.evaluation.settings import TaskSettings
    from sas_megatron.evaluation.task_options import check_options
    from sas_megatron.evaluation.tasks import load_tasks

    try:
        check_options(load_tasks(names, [tasks]).by_name(), TaskSettings(tuple(names), **settings))
    except UserError as error:
        return str(error)
    return None


def test_options_that_the_harness_would_refuse_later_or_ignore_are_rejected(ranks: Any, tasks: Path) -> None:
    def error(names: list[str], **settings: Any) -> Any:
        return ranks(1).run(error_of_options, names, tasks, settings)[0]

    # Five documents, of which one is the question.
    assert error(["next_line"], num_fewshot=4) is None
    for count in (5, 100):
        assert error(["next_line"], num_fewshot=count) == (
            f"--num-fewshot={count}: must not exceed the 4 documents from which next_line draws examples; "
            "use 4 or less"
        )
    assert error(["whole_text"], num_fewshot=1) == (
        "--num-fewshot=1: has no effect, because whole_text take no examples; omit it"
    )
    assert error(["whole_text", "last_word"], num_fewshot=1) is None
    assert error(["last_word", "next_line"], generation="foo=1") == (
        "--generation=foo=1: has no effect, because last_word, next_line generate no text; omit it"
    )
    assert error(["line_end"], generation="max_gen_toks=3") is None
    for limit in (1.5, 0.0, -1, float("inf"), float("nan"), 100.25):
        assert error(["last_word"], limit=limit).startswith(f"--limit={limit}: must be positive: a whole nu")
    for limit in (1, 3.0, 0.5, 1000):
        assert error(["last_word"], limit=limit) is None
    for generation in ("", "foo", "=1", "max_gen_toks=", "max_gen_toks=3,,temperature=1"):
        assert error(["line_end"], generation=generation).startswith(
            f"--generation={generation!r}: must have the form name=value,name=value; use"
        )


def test_what_the_harness_refuses_while_it_runs_is_a_user_error(
    ranks: Any, sas_run: Path, tasks: Path, tmp_path: Path
) -> None:
    sampled, first = (
        ranks(1).run(error_of_evaluation, sas_run, tasks, [], tmp_path / name, [name])[0]
        for name in FAULTY_TASKS
    )
    for message, reason in ((sampled, "ValueError: Sample larger than"), (first, "AssertionError: ")):
        assert message.startswith(f"--tasks=…: lm-evaluation-harness cannot run them ({reason}")
        assert message.endswith("; correct the task files or the options")


def error_of_evaluation(
    directory: Path, tasks: Path, overrides: list[str], folder: Path, names: list[str] = NAMES
) -> str:
    """Return the message with which the evaluation fails."""
    from sas_megatron.config.errors import UserError

    try:
        evaluate_on_rank(directory, tasks, overrides, folder, names)
    except UserError as error:
        return str(error)
    raise AssertionError("the evaluation succeeded")


def test_an_error_while_tasks_run_is_raised_on_all_ranks(
    ranks: Any, sas_run: Path, tasks: Path, tmp_path: Path
) -> None:
    run = functools.partial(ranks(2).run, error_of_evaluation, sas_run, tasks)
    first, second = run(["data.sequence_length=16"], tmp_path)
    assert first == second
    assert re.match(r"continuation='.*': has \d+ tokens, but the model reads at most 16; increase", first)


def assert_equal_answers(actual: Any, expected: Any) -> None:
    """Compare numbers within the float32 tolerance, and other answers exactly."""
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal_answers(one, other)
        return
    try:
        number = float(expected)
    except ValueError:
        assert actual == expected
        return
    import torch

    assert float(actual) == pytest.approx(number, rel=RELATIVE_ERROR[torch.float32], abs=1e-5)


def settings_on_rank(directory: Path, options: list[dict[str, Any]]) -> list[Any]:
    """Return the settings, or the error message, for `generation_kwargs` of a task. Runs on one rank."""
    from sas_megatron.config.errors import UserError
    from sas_megatron.evaluation.harness import HarnessModel

    model, _ = load_on_rank(directory, [])
    found: list[Any] = []
    for given in options:
        try:
            found.append(HarnessModel(model, lambda *_call: None)._settings(given))
        except UserError as error:
            found.append(str(error))
    return found


def test_generation_options_of_tasks_are_converted_or_rejected(ranks: Any, sas_run: Path) -> None:
    from sas_megatron.evaluation.settings import GenerationSettings, Sampling

    greedy = GenerationSettings(max_new_tokens=9, stop=("\n", "</s>"))
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"until": ["\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7, "top_p": 0.9}, greedy),
        ({"until": "\n", "max_new_tokens": 9, "temperature": 0.0}, greedy),
        (
            {"max_gen_toks": 9, "temperature": 0.7, "top_k": 0, "top_p": 0.9},
            GenerationSettings(9, stop=("</s>",), sampling=Sampling(0.7, top_p=0.9)),
        ),
        (
            {"max_gen_toks": 9, "do_sample": True, "top_k": 3},
            GenerationSettings(9, stop=("</s>",), sampling=Sampling(1.0, top_k=3)),
        ),
    ]
    (found,) = ranks(1).run(settings_on_rank, sas_run, [options for options, _ in cases])
    assert found == [expected for _, expected in cases]
    ((beams, long),) = ranks(1).run(
        settings_on_rank, sas_run, [{"num_beams": 4, "max_gen_toks": 9}, {"until": []}]
    )
    assert beams.startswith("generation_kwargs={'num_beams': 4}: are not supported; use until, do_sample")
    assert long.startswith("generation_kwargs.max_gen_toks=256: leaves no room for a context in data.seq")
    invalid: dict[str, list[Any]] = {
        "max_gen_toks": ["abc", 2.5, [3], float("inf"), 0, -1],
        "temperature": ["hot"],
        "top_k": [2.5, "3.5"],
        "top_p": [{}],
        "until": [5, [5]],
    }
    options = [{"max_gen_toks": 9, name: value} for name, values in invalid.items() for value in values]
    (messages,) = ranks(1).run(settings_on_rank, sas_run, options)
    for message, of_message in zip(messages, options, strict=True):
        name = list(of_message)[-1]
        assert message.startswith(f"generation_kwargs.{name}={of_message[name]}: "), message
