"""From a checkpoint to a model on this rank; what the user can mend is found before torch is imported."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sas_megatron.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    checkpoint_name,
    describe_file,
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
from sas_megatron.platform.launcher import launched_world_size

if TYPE_CHECKING:
    from sas_megatron.evaluation.trained_model import TrainedModel


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint, the config that it is to be computed by, and its tokenizer."""

    checkpoint: Path
    config: RunConfig
    tokenizer: Tokenizer

    @property
    def manifest_sha256(self) -> str:
        """What tells the checkpoint from any other: its manifest has the checksums of all its files."""
        return describe_file(self.checkpoint / MANIFEST).sha256


def find_model(source: Path, *, iteration: int | None = None, overrides: Sequence[str] = ()) -> FoundModel:
    """What is needed of a checkpoint, its weights not yet looked at.

    Args:
        source: A run's directory, or one of its checkpoints.
        iteration: The checkpoint after so many steps; None: the newest.
        overrides: `section.field=value`; the layout is that of `parallel.*` here, and not the run's.

    Raises:
        UserError: there is no such checkpoint, or something does not fit it.
    """
    checkpoint = find_run_checkpoint(source, iteration=iteration)
    config = evaluation_config(checkpoint, overrides)
    return FoundModel(checkpoint, config, open_model_tokenizer(config, checkpoint))


@contextlib.contextmanager
def loaded(
    found: FoundModel,
    *,
    check_first: Callable[[], None] = lambda: None,
    timeout_minutes: float | None = None,
) -> Iterator[TrainedModel]:
    """The model on the ranks that were launched, for the length of a `with` block.

    Args:
        found: Which.
        check_first: Called on rank 0 before weights are read; a `UserError` in it all ranks raise.
        timeout_minutes: Of collectives; None: as in the run.

    Raises:
        UserError: the checkpoint is damaged, or of another version.
    """
    from sas_megatron.platform.device import prepare_device

    device = prepare_device()  # before Megatron-core is imported

    from sas_megatron.distributed.object_collectives import run_on_rank0
    from sas_megatron.distributed.topology import joined_topology
    from sas_megatron.evaluation.trained_model import load_trained_model

    training = found.config.training
    with joined_topology(
        found.config.parallel,
        device=device,
        seed=training.seed,
        timeout_minutes=timeout_minutes or training.collective_timeout_minutes,
    ) as topology:
        run_on_rank0(check_first)
        yield load_trained_model(found.checkpoint, found.config, found.tokenizer, topology)


def find_run_checkpoint(source: Path, *, iteration: int | None) -> Path:
    """The checkpoint of a run after so many steps, or its newest; `source` may be a checkpoint itself.

    Raises:
        FileProblem: there is none.
        FieldError: there is none of that iteration.
    """
    remedy = "name a run's directory, or a folder in its checkpoints/"
    if iteration is None:
        newest = find_checkpoint(source)
        if newest is None:
            raise FileProblem(source, "holds no checkpoint", remedy)
        return newest
    within = find_run_checkpoints(source)
    if not within:
        raise FileProblem(source, "holds no checkpoints", "name a run's directory with --iteration")
    for path in within:
        if path.name == checkpoint_name(iteration):
            return path
    raise FieldError(
        "--iteration",
        iteration,
        f"{source} has no checkpoint of it",
        f"use one of {', '.join(str(int(path.name.removeprefix('iter_'))) for path in reversed(within))}",
    )


def run_directory_of(checkpoint: Path) -> Path:
    """The directory of the run whose checkpoint it is; where it was taken elsewhere, the folder it is in."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def evaluation_config(checkpoint: Path, overrides: Sequence[str]) -> RunConfig:
    """The config that trained a checkpoint, laid out anew, without what only training needs.

    The layout is what `overrides` say of `parallel.*`: one rank a model where they say nothing. The ranks
    that it leaves share the work.

    Raises:
        UserError: the config cannot be read, or the overrides change the model or cannot be laid out.
    """
    saved = read_checkpoint_config(checkpoint)
    tree = read_yaml(checkpoint / CONFIG)
    for section in ("parallel", "deepspeed"):
        tree.pop(section, None)
    # The layout of the optimizer and of what is recomputed is that of training.
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
        ("context", "a new token has no sequence that ranks could share"),
        ("virtual_pipeline", "stages that interleave fill the bubble of training only"),
    ):
        if getattr(parallel, field) > 1:
            raise parallel.problem(
                field, f"must be 1 here: {reason}", "use parallel.tensor or parallel.pipeline"
            )
    if parallel.sequence:
        raise parallel.problem(
            "sequence",
            "must be off here: sequences are of any length",
            "leave it out, the results are the same",
        )
    if world_size % parallel.model_size:
        raise FieldError(
            "world size",
            world_size,
            f"must be a multiple of {parallel.model_size}, the ranks of one model "
            f"({parallel.describe_model_ranks()})",
            f"start {parallel.model_size} processes, or change the degrees",
        )


def open_model_tokenizer(config: RunConfig, checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's model, held to what the run recorded of it.

    Raises:
        FileProblem: it is not where it was, or damaged.
        FieldError: it is another.
    """
    path = config.data.tokenizer
    remedy = "name the model's own: data.tokenizer=PATH"
    if not Path(path).exists():
        raise FieldError("data.tokenizer", path, f"is not there, and {checkpoint} holds none", remedy)
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise FieldError(
            "data.tokenizer",
            path,
            f"has {tokenizer.vocab_size} tokens, and model.vocab_size={config.model.vocab_size}",
            remedy,
        )
    recorded = _recorded_tokenizers(run_directory_of(checkpoint) / "run.json")
    if recorded and tokenizer.sha256 not in recorded:
        raise FieldError("data.tokenizer", path, "is not the one that the model was trained with", remedy)
    return tokenizer


def _recorded_tokenizers(record: Path) -> set[str]:
    """Checksums of the tokenizers that wrote a run's token files; none where the checkpoint stands alone."""
    try:
        corpus = json.loads(record.read_text(encoding="utf-8"))["corpus"]
        return {files["tokenizer_sha256"] for files in corpus.values()}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileProblem(
            record, f"is damaged ({error!r})", "put it back from a copy, or take it away"
        ) from None
