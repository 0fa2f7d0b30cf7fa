"""Load tasks of lm-evaluation-harness and evaluate a model on them."""

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

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.distributed.object_collectives import Call, drive_from_rank0
from sas_megatron.evaluation.generation import generate
from sas_megatron.evaluation.harness import HarnessModel
from sas_megatron.evaluation.scoring import score
from sas_megatron.evaluation.settings import TaskSettings
from sas_megatron.evaluation.task_options import describe_harness_error
from sas_megatron.evaluation.trained_model import TrainedModel

# Environment variable that prevents the harness from forking.
_NO_FORKING = "DISABLE_MULTIPROC"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks and groups of the harness with their data, and the manager that loaded them."""

    manager: Any
    tasks: list[Any]

    def by_name(self) -> dict[str, Any]:
        """Return the tasks, also those of groups, by name.

        Raises:
            FieldError: A task is selected twice, directly and in a group.
        """
        try:
            leaves: dict[str, Any] = self.manager.load(self.tasks)["tasks"]
        except ValueError as error:
            raise FieldError("--tasks", "…", str(error), "name each of them once") from None
        return leaves


def load_tasks(
    names: Sequence[str], include_paths: Sequence[Path], *, runs_unsafe_code: bool = False
) -> LoadedTasks:
    """Load tasks, groups and tags with their data.

    Args:
        names: Names, or patterns with `*`.
        include_paths: Folders of additional task files.
        runs_unsafe_code: Allow tasks that run code that the model generates.

    Raises:
        FieldError: A name matches no task, or a task or its data cannot be loaded or run.
        FileProblem: A folder of task files does not exist.
    """
    for path in include_paths:
        if not path.is_dir():
            raise FileProblem(path, "is not a folder", "name a folder of task files with --include-path")
    manager = _read_index(tuple(str(path.absolute()) for path in include_paths))
    tasks: list[Any] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise FieldError(
                "--tasks",
                name,
                f"is not a task, group or tag of lm-eval {lm_eval.__version__}"
                + (" or of --include-path" if include_paths else ""),
                f"did you mean {' or '.join(near)}?" if near else "add a task file with --include-path",
            )
        for match in matching:
            tasks += _load(manager, match)
    loaded = LoadedTasks(manager, tasks)
    _check_runnable(loaded, runs_unsafe_code=runs_unsafe_code)
    return loaded


@functools.lru_cache(maxsize=1)  # Reading all task files takes seconds.
def _read_index(include_paths: tuple[str, ...]) -> Any:
    return TaskManager(include_path=list(include_paths) or None)


def _check_runnable(loaded: LoadedTasks, *, runs_unsafe_code: bool) -> None:
    """Raise errors that the harness would raise only after the model is loaded."""
    for name, task in loaded.by_name().items():
        if getattr(task, "UNSAFE_CODE", False) and not runs_unsafe_code:
            raise FieldError(
                "--tasks",
                name,
                "runs code that the model generates",
                "run it in a sandbox, with --confirm-run-unsafe-code",
            )
        if getattr(task, "MULTIMODAL", False):
            raise FieldError("--tasks", name, "contains images, but the model reads only text", "omit it")


def _load(manager: Any, name: str) -> list[Any]:
    """Load a group, or the tasks of a name, with their data."""
    try:
        loaded = manager.load([name])
    # The files of a task, the loader of its data set and the network can raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no message"
        raise FieldError(
            "--tasks",
            name,
            f"cannot be loaded with its data ({type(error).__name__}: {reason})",
            "download its data to HF_HOME on a machine with a network, or use tasks of --include-path",
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
    """Run the harness on rank 0, which drives the model on all ranks. Every rank must call this function.

    Args:
        model: The evaluated model.
        tasks: The tasks on rank 0; None on the other ranks.
        settings: Settings of the harness.
        folder: Folder for the files of the harness. Its parent folder is shared by the checkpoints of a run.
        cache: Path, without suffix, of the cache of answers; None disables it.

    Returns:
        The results on rank 0; None on the other ranks.

    Raises:
        UserError: A task does not suit the model, or files cannot be written; the same on every rank.
    """
    functions: dict[str, Callable[..., Any]] = {
        "score": functools.partial(
            score, model, batch_tokens=settings.batch_tokens, vocabulary=model.tokenizer.vocab_size
        ),
        "generate": lambda prompts, options, numbers: generate(model, prompts, options, numbers=numbers),
    }

    def run(call: Call) -> dict[str, Any]:
        assert tasks is not None, "rank 0 has the tasks"
        return _run_harness(HarnessModel(model, call), tasks, settings, folder=folder, cache=cache)

    return drive_from_rank0(run, functions)


@contextlib.contextmanager
def _resampling_in_this_process() -> Iterator[None]:
    """Prevent the harness from forking to compute standard errors.

    A fork of a process with threads, which collectives start, may deadlock.
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


@contextlib.contextmanager
def _reporting_harness_errors() -> Iterator[None]:
    """Raise a user error for an exception of the harness, or of the files of a task, in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (problem := describe_harness_error(error)) is not None:
            raise problem from error
        raise


def _run_harness(
    model: HarnessModel, tasks: LoadedTasks, settings: TaskSettings, *, folder: Path, cache: Path | None
) -> dict[str, Any]:
    tracker = EvaluationTracker(output_path=str(folder.parent))
    # The harness prints messages, but stdout must contain only the results.
    with contextlib.redirect_stdout(sys.stderr), _resampling_in_this_process(), _reporting_harness_errors():
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={"model": folder.name},  # The harness names its folder after the model.
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
    # The harness ignores errors of writing its files.
    if len(written) < 1 + len(samples):
        raise FileProblem(
            folder, "lacks files that the harness could not write", "free space, or name another --output"
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
