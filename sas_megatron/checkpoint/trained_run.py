"""What commands read of a trained run: its directory, one of its checkpoints, and its tokenizer. No torch.

A run keeps a copy of its tokenizer, so that its model can be used where the paths in its config do not exist.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from sas_megatron.checkpoint.manifest import (
    DamagedCheckpoint,
    checkpoint_name,
    find_checkpoint,
    find_checkpoints,
    find_run_checkpoints,
    is_complete,
)
from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import find_tokenizer, load_tokenizer, tokenizer_exists
from sas_megatron.io.run_record import RECORD, damaged_record, read_run_record

logger = logging.getLogger(__name__)


def select_checkpoint(source: Path, *, iteration: int | None) -> Path:
    """Return the checkpoint of a run after `iteration` steps, or its newest checkpoint.

    Args:
        source: A run directory, or a checkpoint if `iteration` is None.
        iteration: Step of the checkpoint; None selects the newest.

    Raises:
        FileProblem: The run has no checkpoints.
        FieldError: The run has no checkpoint of that step.
    """
    if iteration is None:
        newest = find_checkpoint(source)
        if newest is None:
            raise FileProblem(
                source, "contains no checkpoint", "name a run directory, or a folder in its checkpoints/"
            )
        return newest
    checkpoints = find_run_checkpoints(source)
    if not checkpoints:
        raise FileProblem(source, "contains no checkpoints", "name a run directory with --iteration")
    for path in checkpoints:
        if path.name == checkpoint_name(iteration):
            return path
    steps = [str(_step_of(path)) for path in reversed(checkpoints)]
    raise FieldError(
        "--iteration", iteration, f"{source} has no such checkpoint", f"use one of {', '.join(steps)}"
    )


def find_run_directory(checkpoint: Path) -> Path:
    """Return the run directory of a checkpoint; for a copied checkpoint, the folder that contains it."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


@contextlib.contextmanager
def offering_another_checkpoint(checkpoint: Path, suggest: Callable[[Path], str]) -> Iterator[None]:
    """Give an error about a damaged checkpoint in the block the remedy of what reads it.

    Args:
        checkpoint: The checkpoint that is read.
        suggest: Returns how the user can select another checkpoint of the run.

    Raises:
        DamagedCheckpoint: The block raised one.
    """
    try:
        yield
    except DamagedCheckpoint as damage:
        others = [
            path for path in find_checkpoints(checkpoint.parent) if path != checkpoint and is_complete(path)
        ]
        remedy = f"or {suggest(others[0])}" if others else "since the run has no other complete checkpoint"
        raise DamagedCheckpoint(damage.path, damage.problem, f"restore it from a copy, {remedy}") from None


def suggest_iteration(source: Path, checkpoint: Path) -> Callable[[Path], str]:
    """Return a suggestion for `offering_another_checkpoint` of a command that has the option `--iteration`.

    Args:
        source: The path that the user gave: a run directory, or `checkpoint`.
        checkpoint: The checkpoint that is read.
    """
    if source == checkpoint:
        return suggest_path
    return lambda other: f"use another checkpoint with --iteration {_step_of(other)}"


def suggest_path(other: Path) -> str:
    """Return a suggestion for `offering_another_checkpoint` of a command that takes a path."""
    return f"name another checkpoint: {other}"


def open_model_tokenizer(config: RunConfig, checkpoint: Path, *, option: str, given: str | None) -> Tokenizer:
    """Open the tokenizer of a checkpoint's model and check that the run was trained with it.

    Without `given`, it is the tokenizer of the config, or the copy in the run directory if the path holds
    none or another one.

    Args:
        config: The config of the run.
        checkpoint: The checkpoint.
        option: How the user can name the tokenizer, for messages.
        given: The path that the user named, if any.

    Raises:
        FileProblem: The tokenizer or the record of the run is damaged.
        FieldError: The tokenizer does not exist, or it is not the one of the run.
    """
    run = find_run_directory(checkpoint)
    recorded = _read_tokenizer_checksums(run)
    remedy = f"name the tokenizer of the model with {option}"
    location, copy = given or config.data.tokenizer, find_tokenizer(run)
    if given is None and copy is not None and not _is_recorded(location, config, recorded):
        logger.info("%s is not the tokenizer of the run; its copy is used: %s", location, copy)
        location = str(copy)
    if not tokenizer_exists(location):
        raise FieldError("data.tokenizer", location, f"does not exist, and {run} contains no copy", remedy)
    tokenizer = open_fitting_tokenizer(location, config, remedy=remedy)
    if recorded and tokenizer.sha256 not in recorded:
        raise FieldError("data.tokenizer", location, "differs from the tokenizer of the training run", remedy)
    return tokenizer


def open_fitting_tokenizer(location: str, config: RunConfig, *, remedy: str) -> Tokenizer:
    """Open a tokenizer and check that the model of a config has a row for each of its tokens.

    Raises:
        FileProblem: The tokenizer is damaged.
        FieldError: It has more tokens than the model.
    """
    tokenizer = load_tokenizer(location, end_of_document=config.data.end_of_document)
    if not tokenizer.fits(config.model.vocab_size):
        raise FieldError(
            "data.tokenizer",
            location,
            f"has {tokenizer.vocab_size} tokens, but model.vocab_size={config.model.vocab_size}",
            remedy,
        )
    return tokenizer


def _is_recorded(location: str, config: RunConfig, recorded: set[str]) -> bool:
    """Return whether a location holds the tokenizer of the run; without a record, whether it exists."""
    if not recorded or not tokenizer_exists(location):
        return tokenizer_exists(location)
    with contextlib.suppress(UserError):
        tokenizer = load_tokenizer(location, end_of_document=config.data.end_of_document)
        return tokenizer.sha256 in recorded
    return False


def _read_tokenizer_checksums(run: Path) -> set[str]:
    """Return the checksums of the tokenizers of a run's token files; empty without a run.json."""
    record = read_run_record(run)
    if record is None:
        return set()
    if record.corpus is None:
        raise damaged_record(run / RECORD, "corpus: Field required")
    return {tokens.tokenizer_sha256 for tokens in record.corpus.values()}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))
