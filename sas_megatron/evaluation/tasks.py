"""Tasks of lm-evaluation-harness: which are asked for, and what comes of them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.distributed.object_collectives import Call, drive_from_rank0
from sas_megatron.evaluation.generation import generate
from sas_megatron.evaluation.harness import HarnessModel
from sas_megatron.evaluation.scoring import score
from sas_megatron.evaluation.task_settings import TaskSettings
from sas_megatron.evaluation.trained_model import TrainedModel

# What the harness asks the environment.
_NO_FORKING = "DISABLE_MULTIPROC"


@dataclass(frozen=True)
class LoadedTasks:
    """The harness's tasks and groups with their data, and what found them."""

    manager: Any
    tasks: list[Any]


def load_tasks(
    names: Sequence[str], include_paths: Sequence[Path], *, runs_unsafe_code: bool = False
) -> LoadedTasks:
    """The tasks, groups and tags of these names or patterns.

    Raises:
        FieldError: there is none of a name, it cannot be loaded, its data included, or not be run.
        FileProblem: a folder of task files is not there.
    """
    for path in include_paths:
        if not path.is_dir():
            raise FileProblem(path, "is no folder of task files", "give one that exists as --include-path")
    manager = _read_index(tuple(str(path.absolute()) for path in include_paths))
    tasks: list[Any] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise FieldError(
                "--tasks",
                name,
                f"is no task, group or tag of lm-eval {lm_eval.__version__}"
                + (" or of --include-path" if include_paths else ""),
                f"did you mean {' or '.join(near)}?" if near else "add a task file with --include-path",
            )
        for match in matching:
            tasks += _load(manager, match)
    _check_runnable(manager, tasks, runs_unsafe_code=runs_unsafe_code)
    return LoadedTasks(manager, tasks)


@functools.lru_cache(maxsize=1)  # it reads every task file, which takes seconds
def _read_index(include_paths: tuple[str, ...]) -> Any:
    return TaskManager(include_path=list(include_paths) or None)


def _check_runnable(manager: Any, tasks: list[Any], *, runs_unsafe_code: bool) -> None:
    """What the harness would refuse after the model is loaded."""
    try:
        leaves = manager.load(tasks)["tasks"]
    except ValueError as error:  # a task of its own that is also of a group
        raise FieldError("--tasks", "…", str(error), "name each of them once") from None
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False) and not runs_unsafe_code:
            raise FieldError(
                "--tasks",
                name,
                "runs code that the model writes",
                "give --confirm-run-unsafe-code where that can do no harm",
            )
        if getattr(task, "MULTIMODAL", False):
            raise FieldError("--tasks", name, "has images, and the model reads text", "leave it out")


def _load(manager: Any, name: str) -> list[Any]:
    """A group or the tasks of a name, with their data."""
    try:
        loaded = manager.load([name])
    # Whatever a task's files, its data set's loader or the network have to say.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no message"
        raise FieldError(
            "--tasks",
            name,
            f"cannot be loaded with its data ({type(error).__name__}: {reason})",
            "fetch it where there is a network, HF_HOME being where it is kept, or give a task of your own "
            "with --include-path",
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def evaluate_tasks(
    model: TrainedModel,
    tasks: LoadedTasks | None,
    settings: TaskSettings,
    *,
    folder: Path,
    cache: Path | None,
) -> dict[str, Any] | None:
    """Runs the harness on rank 0, which has the tasks; every rank must call it.

    Args:
        model: What is evaluated.
        tasks: None on the other ranks.
        settings: How.
        folder: Of the harness's files, within one that is shared by checkpoints.
        cache: Where answers are kept and looked up, without ending; None: nowhere.

    Returns:
        The results, on rank 0.
    """
    functions: dict[str, Callable[..., Any]] = {
        "score": functools.partial(
            score, model, batch_tokens=settings.batch_tokens, vocabulary=model.tokenizer.vocab_size
        ),
        "generate": lambda prompts, how, numbers: generate(model, prompts, how, numbers=numbers),
    }

    def run(call: Call) -> dict[str, Any]:
        assert tasks is not None, "rank 0 has the tasks"
        return _run_harness(HarnessModel(model, call), tasks, settings, folder=folder, cache=cache)

    return drive_from_rank0(run, functions)


@contextlib.contextmanager
def _resampling_in_this_process() -> Iterator[None]:
    """Keeps the harness from forking for its standard errors: a fork of a process whose collectives have
    threads may never come back.
    """
    before = os.environ.get(_NO_FORKING)
    os.environ[_NO_FORKING] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_FORKING]
        else:
            os.environ[_NO_FORKING] = before


def _run_harness(
    model: HarnessModel, tasks: LoadedTasks, settings: TaskSettings, *, folder: Path, cache: Path | None
) -> dict[str, Any]:
    tracker = EvaluationTracker(output_path=str(folder.parent))
    # It prints what it does, where results are to stand alone.
    with contextlib.redirect_stdout(sys.stderr), _resampling_in_this_process():
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={"model": folder.name},  # names the folder of the harness's files
            tasks=tasks.tasks,
            task_manager=tasks.manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            use_cache=None if cache is None else str(cache),
            gen_kwargs=settings.generation,
            bootstrap_iters=settings.bootstrap_iterations,
            evaluation_tracker=tracker,
            log_samples=True,
            apply_chat_template=False,
            confirm_run_unsafe_code=settings.runs_unsafe_code,
        )
    samples = results.pop("samples")
    before = set(folder.glob("*")) if folder.exists() else set()
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, of_task in samples.items():
        tracker.save_results_samples(task_name=name, samples=of_task)
    written = sorted(path.name for path in set(folder.glob("*")) - before)
    # The harness goes on without a file that it could not write.
    if len(written) < 1 + len(samples):
        raise FileProblem(
            folder, "some of the harness's files could not be written", "make room or name --output"
        )
    return {
        "lm_eval": lm_eval.__version__,
        "settings": settings.as_dict(),
        "results": results["results"],
        "groups": results.get("groups", {}),
        "versions": results["versions"],
        "num_fewshot": results["n-shot"],
        "num_samples": results["n-samples"],
        "files": written,
    }
