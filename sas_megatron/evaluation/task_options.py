"""Checks of options against loaded tasks, before the model is loaded.

The harness (lm-eval 0.4) would raise plain exceptions after the model is loaded, or ignore an option.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import sas_megatron
from sas_megatron.config.errors import FieldError
from sas_megatron.evaluation.settings import TaskSettings

logger = logging.getLogger(__name__)

_PACKAGE = str(Path(sas_megatron.__file__).parent)


def check_options(tasks: dict[str, Any], settings: TaskSettings) -> None:
    """Check that tasks can be run with the settings, and that each option has an effect on one of them.

    Args:
        tasks: The tasks of the harness by name, without groups.
        settings: The settings.

    Raises:
        FieldError: A task has too few documents, or an option affects no task.
    """
    for name, task in tasks.items():
        if len(task.eval_docs) == 0:
            raise FieldError("--tasks", name, "has no documents", "correct its data, or omit it")
        _check_examples(name, task, settings)
    names = ", ".join(tasks)
    if settings.generation is not None and not any(map(_generates, tasks.values())):
        raise FieldError(
            "--generation", settings.generation, f"has no effect, because {names} generate no text", "omit it"
        )
    if settings.num_fewshot:
        unaffected = [name for name, task in tasks.items() if not _takes_examples(task)]
        if len(unaffected) == len(tasks):
            raise FieldError(
                "--num-fewshot",
                settings.num_fewshot,
                f"has no effect, because {names} take no examples",
                "omit it",
            )
        if unaffected:
            logger.warning("--num-fewshot has no effect on %s", ", ".join(unaffected))


def _check_examples(name: str, task: Any, settings: TaskSettings) -> None:
    """Check that a task has enough documents for the examples before each question."""
    stated = task.get_config("num_fewshot")
    is_given = settings.num_fewshot is not None and _takes_examples(task)
    count = settings.num_fewshot if is_given else stated
    if not count or not _takes_examples(task):
        return
    # The harness draws one more if the examples are documents of the test split.
    config = task.fewshot_cfg
    num_excluded = int(config.split is not None and config.split == task.get_config("test_split"))
    available = len(list(task.fewshot_docs() or [])) - num_excluded
    if count > available:
        raise FieldError(
            "--num-fewshot",
            count,
            f"must not exceed the {available} documents from which {name} draws examples",
            f"use {available} or less"
            if is_given
            else f"use --num-fewshot={available} or less, or correct num_fewshot in the task",
        )


def _generates(task: Any) -> bool:
    return bool(task.get_config("output_type") == "generate_until")


def _takes_examples(task: Any) -> bool:
    """Return whether the harness puts examples before a question: not if the task fixes them at 0."""
    is_rolling = task.get_config("output_type") == "loglikelihood_rolling"
    return not is_rolling and bool(task.get_config("num_fewshot") != 0)


def describe_harness_error(error: Exception) -> FieldError | None:
    """Return the error to raise if the harness or the code of a task raised `error`; otherwise None.

    The files of a task can make the harness raise any exception.
    """
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last_of_package = max((i for i, name in enumerate(frames) if name.startswith(_PACKAGE)), default=-1)
    if not any("lm_eval" in Path(name).parts for name in frames[last_of_package + 1 :]):
        return None
    reason = " ".join(str(error).split())[:300] or "no message"
    return FieldError(
        "--tasks",
        "…",
        f"lm-evaluation-harness cannot run them ({type(error).__name__}: {reason})",
        "correct the task files or the options",
    )
