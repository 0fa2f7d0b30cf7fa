"""Find a checkpoint to evaluate, check it before torch is imported, and load its model on the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sas_megatron.checkpoint.manifest import CONFIG, MANIFEST
from sas_megatron.checkpoint.trained_run import (
    offering_another_checkpoint,
    open_model_tokenizer,
    select_checkpoint,
    suggest_iteration,
)
from sas_megatron.checkpoint.weights_source import (
    describe_architecture,
    raise_if_architectures_differ,
    read_checkpoint_config,
)
from sas_megatron.config.errors import FieldError
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
    # The path that the user named: the checkpoint, or its run directory.
    source: Path

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
    with offering_another_checkpoint(checkpoint, suggest_iteration(source, checkpoint)):
        config = build_evaluation_config(checkpoint, overrides)
    is_given = any(override.startswith("data.tokenizer=") for override in overrides)
    tokenizer = open_model_tokenizer(
        config,
        checkpoint,
        option="data.tokenizer=PATH",
        given=config.data.tokenizer if is_given else None,
    )
    # Validation windows are built with the tokenizer that the config names.
    config = config.replaced({"data.tokenizer": tokenizer.location})
    return ModelSource(checkpoint, config, tokenizer, source)


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
        suggest = suggest_iteration(source.source, source.checkpoint)
        with offering_another_checkpoint(source.checkpoint, suggest):
            model = load_trained_model(source.checkpoint, source.config, source.tokenizer, topology)
        yield model


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
