"""Find a checkpoint to evaluate, check it before torch is imported, and load its model on the ranks."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sas_megatron.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    checkpoint_name,
    find_checkpoint,
    find_run_checkpoints,
)
from sas_megatron.checkpoint.weights_source import (
    describe_architecture,
    raise_if_architectures_differ,
    read_checkpoint_config,
)
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import apply_overrides, build_run_config, read_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.io.file_records import describe_file
from sas_megatron.platform.launcher import launched_world_size

if TYPE_CHECKING:
    from sas_megatron.evaluation.trained_model import TrainedModel


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint, the config with which its model is evaluated, and its tokenizer."""

    checkpoint: Path
    config: RunConfig
    tokenizer: Tokenizer

    @property
    def manifest_sha256(self) -> str:
        """Checksum that identifies the checkpoint: the manifest contains the checksums of all its files."""
        return describe_file(self.checkpoint / MANIFEST).sha256


def find_model_source(
    source: Path, *, iteration: int | None = None, overrides: Sequence[str] = ()
) -> ModelSource:
    """Find a checkpoint, its config and its tokenizer. The weights are not read.

    Args:
        source: A run directory or a checkpoint.
        iteration: Step of the checkpoint; None selects the newest.
        overrides: `section.field=value`. The layout is given by `parallel.*` here, not by the config of the
            run.

    Raises:
        UserError: The checkpoint does not exist, or an override or the tokenizer does not match it.
    """
    checkpoint = select_checkpoint(source, iteration=iteration)
    config = build_evaluation_config(checkpoint, overrides)
    return ModelSource(checkpoint, config, open_model_tokenizer(config, checkpoint))


@contextlib.contextmanager
def load_model(
    source: ModelSource,
    *,
    check_first: Callable[[], None] = lambda: None,
    timeout_minutes: float | None = None,
) -> Iterator[TrainedModel]:
    """Join the launched ranks and load the model on them, for the duration of a `with` block.

    Args:
        source: The checkpoint.
        check_first: Called on rank 0 before weights are read. All ranks raise a `UserError` that it raises.
        timeout_minutes: Timeout of collectives; None selects that of the run.

    Raises:
        UserError: The checkpoint is damaged, this version does not read it, or `check_first` raised an error.
    """
    from sas_megatron.platform.device import prepare_device

    device = prepare_device()  # This must precede the import of Megatron-core.

    from sas_megatron.distributed.object_collectives import run_on_rank0
    from sas_megatron.distributed.topology import joined_topology
    from sas_megatron.evaluation.trained_model import load_trained_model

    training = source.config.training
    with joined_topology(
        source.config.parallel,
        device=device,
        seed=training.seed,
        timeout_minutes=timeout_minutes or training.collective_timeout_minutes,
    ) as topology:
        run_on_rank0(check_first)
        yield load_trained_model(source.checkpoint, source.config, source.tokenizer, topology)


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
    steps = [str(int(path.name.removeprefix("iter_"))) for path in reversed(checkpoints)]
    raise FieldError(
        "--iteration", iteration, f"{source} has no such checkpoint", f"use one of {', '.join(steps)}"
    )


def find_run_directory(checkpoint: Path) -> Path:
    """Return the run directory of a checkpoint; for a copied checkpoint, the folder that contains it."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def build_evaluation_config(checkpoint: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the config of a checkpoint with another layout and without settings that only training needs.

    The layout is that of `parallel.*` in `overrides`, by default one rank per model. Additional ranks become
    data-parallel ranks.

    Raises:
        UserError: The config cannot be read, or the overrides change the model or give an unsupported layout.
    """
    saved = read_checkpoint_config(checkpoint)
    tree = read_yaml(checkpoint / CONFIG)
    for section in ("parallel", "deepspeed"):
        tree.pop(section, None)
    # Recomputation and the sharding of the optimizer concern training only.
    for field in ("engine", "recompute", "recompute_modules", "recompute_layers"):
        tree["training"].pop(field, None)
    tree["optimizer"].pop("distributed", None)
    apply_overrides(tree, overrides)
    config = build_run_config(tree)
    raise_if_architectures_differ(
        describe_architecture(saved.model, saved.attention),
        describe_architecture(config.model, config.attention),
        origin=checkpoint,
    )
    _check_layout(config, world_size=launched_world_size())
    return config


def _check_layout(config: RunConfig, *, world_size: int) -> None:
    parallel = config.parallel
    for field, reason in (
        ("context", "a single new token cannot be sharded over ranks"),
        ("virtual_pipeline", "interleaved stages only reduce the pipeline bubble of training"),
    ):
        if getattr(parallel, field) > 1:
            raise parallel.problem(
                field, f"must be 1 for evaluation: {reason}", "use parallel.tensor or parallel.pipeline"
            )
    if parallel.sequence:
        raise parallel.problem(
            "sequence",
            "must be off for evaluation, where sequences can have any length",
            "omit it; the results are the same",
        )
    if world_size % parallel.model_size:
        raise FieldError(
            "world size",
            world_size,
            f"must be a multiple of {parallel.model_size}, the number of ranks per model "
            f"({parallel.describe_model_ranks()})",
            f"start {parallel.model_size} processes, or change the parallel sizes",
        )


def open_model_tokenizer(config: RunConfig, checkpoint: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint's model and check that the run was trained with it.

    Raises:
        FileProblem: The tokenizer or the record of the run is damaged.
        FieldError: The tokenizer does not exist, or it is not the one of the run.
    """
    path = config.data.tokenizer
    remedy = "name the tokenizer of the model with data.tokenizer=PATH"
    if not os.path.exists(path):
        raise FieldError("data.tokenizer", path, f"does not exist, and {checkpoint} contains no copy", remedy)
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise FieldError(
            "data.tokenizer",
            path,
            f"has {tokenizer.vocab_size} tokens, but model.vocab_size={config.model.vocab_size}",
            remedy,
        )
    recorded = _read_tokenizer_checksums(find_run_directory(checkpoint) / "run.json")
    if recorded and tokenizer.sha256 not in recorded:
        raise FieldError("data.tokenizer", path, "differs from the tokenizer of the training run", remedy)
    return tokenizer


def _read_tokenizer_checksums(record: Path) -> set[str]:
    """Return the checksums of the tokenizers of a run's token files; empty without a run.json."""
    try:
        corpus = json.loads(record.read_text(encoding="utf-8"))["corpus"]
        return {files["tokenizer_sha256"] for files in corpus.values()}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileProblem(record, f"is damaged ({error!r})", "restore it from a copy, or remove it") from None
