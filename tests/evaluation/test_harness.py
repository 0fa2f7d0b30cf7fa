"""lm-evaluation-harness: our scores and texts are those of its own `hf` model on the export, item by item."""

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


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files; the harness's data sets are kept beside it, and nothing is fetched."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    corpus = builtin_corpus(folder, max_bytes=200_000)
    written = write_tasks(folder / "tasks", list(stream_documents([corpus])))
    text = (written / "last_word.yaml").read_text(encoding="utf-8")
    without_data = text.replace("task: last_word", "task: lost").replace("last_word.jsonl", "nowhere.jsonl")
    (written / "lost.yaml").write_text(without_data, encoding="utf-8")
    return written


RUNS = {"sas": {**small.SAS_GROUPED, "head_expansion": 2}, "gqa": small.GQA}


@pytest.fixture(scope="module")
def trained(
    ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainedRun]:
    """`trained(name)` is the trained run of an attention."""
    return functools.cache(
        lambda name: train_and_export(ranks, small_data, tmp_path_factory.mktemp(name), RUNS[name])
    )


@pytest.fixture(scope="module")
def sas_run(trained: Callable[[str], TrainedRun]) -> Path:
    return trained("sas").directory


def read_samples(folder: Path) -> Samples:
    """Of each task, by document."""
    found: Samples = {}
    for name in NAMES:
        (path,) = folder.glob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[name] = sorted(lines, key=lambda sample: sample["doc_id"])
    return found


def evaluate_by_transformers(exported: Path, tasks: Path, folder: Path) -> None:
    """On a rank: the harness's own `hf` model, its files written where ours would be."""
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
    directory: Path, tasks: Path, overrides: list[str], folder: Path, **settings: Any
) -> dict[str, Any] | None:
    """On a rank: our evaluation, as the command runs it."""
    from sas_megatron.evaluation.task_settings import TaskSettings
    from sas_megatron.evaluation.tasks import evaluate_tasks, load_tasks

    model, _ = load_on_rank(directory, overrides)
    chosen = TaskSettings(tuple(NAMES), bootstrap_iterations=0, batch_tokens=150, **settings)
    loaded = load_tasks(chosen.names, [tasks]) if model.topology.is_rank0 else None
    return evaluate_tasks(model, loaded, chosen, folder=folder, cache=None)


@pytest.fixture(scope="module")
def theirs(
    ranks: Any, trained: Callable[[str], TrainedRun], tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Samples]:
    """`theirs(name)` are the results of the harness's own model on the export of a run."""

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
def test_scores_and_texts_are_those_of_the_harness_on_the_export(
    ranks: Any,
    trained: Callable[[str], TrainedRun],
    theirs: Callable[[str], Samples],
    tasks: Path,
    tmp_path: Path,
    attention: str,
    layout: str,
) -> None:
    world_size, overrides = LAYOUTS[layout]
    folder = tmp_path / "ours"
    results, *others = ranks(world_size).run(
        evaluate_on_rank, trained(attention).directory, tasks, overrides, folder
    )
    assert others == [None] * (world_size - 1)
    ours = read_samples(folder)
    for name in NAMES:
        assert len(ours[name]) == NUM_DOCUMENTS
        for mine, expected in zip(ours[name], theirs(attention)[name], strict=True):
            assert mine["doc"] == expected["doc"]
            assert_equal_answers(mine["filtered_resps"], expected["filtered_resps"])
    assert set(results["results"]) == set(NAMES)


def refusal_of_tasks(names: list[str], folder: Path) -> str:
    """On the one rank: why they cannot be loaded."""
    from sas_megatron.config.errors import UserError
    from sas_megatron.evaluation.tasks import load_tasks

    try:
        load_tasks(names, [folder])
    except UserError as error:
        return str(error)
    raise AssertionError("they can")


def test_tasks_that_are_unknown_or_without_data_are_refused(ranks: Any, tasks: Path, tmp_path: Path) -> None:
    (unknown, without_data, no_folder) = (
        ranks(1).run(refusal_of_tasks, names, folder)[0]
        for names, folder in ((["next_lin"], tasks), (["lost"], tasks), (["lost"], tmp_path / "none"))
    )
    assert unknown.startswith("--tasks=next_lin: is no task, group or tag of lm-eval ")
    assert "did you mean next_line" in unknown
    assert without_data.startswith("--tasks=lost: cannot be loaded with its data (FileNotFoundError: ")
    assert no_folder.startswith(f"{tmp_path / 'none'}: is no folder of task files; give")


def refusal_on_rank(directory: Path, tasks: Path, overrides: list[str], folder: Path, **settings: Any) -> str:
    from sas_megatron.config.errors import UserError

    try:
        evaluate_on_rank(directory, tasks, overrides, folder, **settings)
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


def test_what_is_met_while_tasks_run_ends_all_ranks_with_one_message(
    ranks: Any, sas_run: Path, tasks: Path, tmp_path: Path
) -> None:
    run = functools.partial(ranks(2).run, refusal_on_rank, sas_run, tasks)
    first, second = run(["data.sequence_length=16"], tmp_path)
    assert first == second
    assert re.match(r"continuation='.*': is \d+ tokens after its context, and the model reads 16; set", first)


def assert_equal_answers(mine: Any, expected: Any) -> None:
    """Log-probabilities within the table's float32, all else exactly."""
    if isinstance(expected, list):
        assert len(mine) == len(expected)
        for one, other in zip(mine, expected, strict=True):
            assert_equal_answers(one, other)
        return
    try:
        number = float(expected)
    except ValueError:
        assert mine == expected
        return
    import torch

    assert float(mine) == pytest.approx(number, rel=RELATIVE_ERROR[torch.float32], abs=1e-5)


def settings_on_rank(directory: Path, options: list[dict[str, Any]]) -> list[Any]:
    """On the one rank: what comes of a task's `generation_kwargs`, or why it is refused."""
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


def test_generation_options_of_tasks_are_read_or_refused(ranks: Any, sas_run: Path) -> None:
    from sas_megatron.evaluation.generation_settings import GenerationSettings, Sampling

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
    assert beams.startswith("generation_kwargs={'num_beams': 4}: are not offered; use until, do_sample")
    assert long.startswith("generation_kwargs.max_gen_toks=256: leaves no room for a context in data.seq")
    unfit: dict[str, list[Any]] = {
        "max_gen_toks": ["abc", 2.5, [3], float("inf"), 0, -1],
        "temperature": ["hot"],
        "top_k": [2.5, "3.5"],
        "top_p": [{}],
        "until": [5, [5]],
    }
    options = [{"max_gen_toks": 9, name: value} for name, values in unfit.items() for value in values]
    (refused,) = ranks(1).run(settings_on_rank, sas_run, options)
    for message, of_message in zip(refused, options, strict=True):
        name = list(of_message)[-1]
        assert message.startswith(f"generation_kwargs.{name}={of_message[name]}: "), message
