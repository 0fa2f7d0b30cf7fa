"""Sources of initial weights, and the check that they belong to the same model; no torch.

A source is recognized by the files in its folder:

weights.json                       unsharded weights, written by `checkpoint import`
manifest.json                      a checkpoint of any layout and engine
checkpoints/, or iter_0001000/ …   a run, whose newest checkpoint is used
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sas_megatron.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    find_checkpoint,
    raise_if_damaged,
    read_manifest,
)
from sas_megatron.checkpoint.trained_run import offering_another_checkpoint
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import format_override, load_run_config
from sas_megatron.config.model import ModelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.io.file_records import (
    describe_file,
    describe_read_error,
    find_damage,
    parse_json,
    read_regular_file,
)

Architecture = dict[str, dict[str, Any]]

# Fields that do not change the function of given weights: initialization, regularization, vocabulary padding,
# and implementations that compute the same result.
_IGNORED_MODEL_FIELDS = {
    "init_std",
    "output_init",
    "hidden_dropout",
    "vocab_multiple",
    "output_loss",
    "z_loss",
}
_IGNORED_ATTENTION_FIELDS = {
    "initialization",
    "output_initialization",
    "dropout",
    "backend",
    "exchange",
    "kernel",
    "kv_cache",
}

SCHEMA_VERSION = 1
# Unsharded weights: FOLDER/weights*.safetensors under global names, and their record.
STEM = "weights"
RECORD = "weights.json"


def describe_architecture(model: ModelConfig, attention: AttentionConfig) -> Architecture:
    """Return the fields of the sections `model` and `attention` that determine the computed function.

    Defaults are resolved. The result is stored with weights, so that they are not loaded into a different
    model whose tensors have the same shapes.
    """
    fields = attention.model_dump(mode="json", exclude=_IGNORED_ATTENTION_FIELDS)
    return {
        "model": model.model_dump(mode="json", exclude=_IGNORED_MODEL_FIELDS),
        "attention": fields | attention.resolved_fields(),
    }


def raise_if_architectures_differ(
    actual: Architecture, expected: Architecture, *, ignored: frozenset[str] = frozenset(), origin: object
) -> None:
    """Check that weights have the architecture that a config describes.

    Args:
        actual: Architecture of the weights.
        expected: Architecture of the config. Fields that it lacks are not compared.
        ignored: Dotted names of fields that may differ.
        origin: Location of the weights, for the message.

    Raises:
        FieldError: A field of `expected` has another value in `actual`. The error names the first such field.
    """
    for section, fields in expected.items():
        for name, value in fields.items():
            actual_value, field = actual[section].get(name), f"{section}.{name}"
            if value != actual_value and field not in ignored:
                raise FieldError(
                    field,
                    value,
                    f"must be {actual_value}, as for the weights in {origin}",
                    f"set {field}={actual_value}",
                    (format_override(field, actual_value),),
                )


def raise_if_vocab_padding_differs(actual: ModelConfig, expected: ModelConfig, *, origin: object) -> None:
    """Check that the embedding of a config has the same number of rows as the weights.

    Args:
        actual: The section `model` of the weights.
        expected: The section `model` of the config.
        origin: Location of the weights, for the message.

    Raises:
        FieldError: The numbers of rows differ.
    """
    if expected.padded_vocab_size != actual.padded_vocab_size:
        raise FieldError(
            "model.vocab_multiple",
            expected.vocab_multiple,
            f"gives {expected.padded_vocab_size} rows of the embedding, but the weights in {origin} have "
            f"{actual.padded_vocab_size}",
            f"set model.vocab_multiple={actual.vocab_multiple}",
            (f"model.vocab_multiple={actual.vocab_multiple}",),
        )


class WeightsRecord(BaseModel):
    """The contents of weights.json: architecture, checksum and origin of unsharded weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    # As returned by `describe_architecture`.
    architecture: dict[str, dict[str, Any]]
    weights_sha256: str
    origin: str

    def write(self, folder: Path) -> None:
        """Write weights.json into `folder`."""
        (folder / RECORD).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> WeightsRecord:
    """Read the record of unsharded weights.

    Raises:
        FileProblem: weights.json is missing, cannot be read, or has a newer format.
    """
    path, remedy = folder / RECORD, "name a folder that `sas-megatron checkpoint import` wrote"
    try:
        fields = parse_json(read_regular_file(path))
        version = fields.get("schema_version", 0) if isinstance(fields, dict) else 0
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise FileProblem(path, f"is newer than format {SCHEMA_VERSION}", "update the package")
        record = WeightsRecord.model_validate(fields)
        if not {"model", "attention"} <= record.architecture.keys():
            raise ValueError("architecture lacks model or attention")
        return record
    except (OSError, ValueError) as error:
        reason = describe_read_error(error)
        raise FileProblem(path, f"is not a record of unsharded weights ({reason})", remedy) from None


@dataclass(frozen=True)
class WeightsSource:
    """A checkpoint, or a folder of unsharded weights."""

    folder: Path
    is_checkpoint: bool

    def describe(self) -> dict[str, Any]:
        """Return the location and checksum of the weights, which run.json records.

        Raises:
            FileProblem: The manifest or the record of the weights cannot be read.
        """
        folder = {"folder": str(self.folder.resolve())}
        if self.is_checkpoint:
            manifest_sha256 = describe_file(self.folder / MANIFEST).sha256
            return {**folder, "step": read_manifest(self.folder).step, "manifest_sha256": manifest_sha256}
        record = read_record(self.folder)
        return {**folder, "origin": record.origin, "weights_sha256": record.weights_sha256}


def find_weights(path: Path, config: RunConfig) -> WeightsSource:
    """Find the weights at `path`, the value of `checkpoint.initial_weights`, for the model of `config`.

    Raises:
        UserError: There are no usable weights at `path`, or they belong to a different model.
    """
    expected = describe_architecture(config.model, config.attention)
    if (path / RECORD).exists():
        actual = _with_defaults(read_record(path).architecture, config)
        raise_if_architectures_differ(actual, expected, origin=path)
        return WeightsSource(path, is_checkpoint=False)
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileProblem(
            path,
            "contains neither a checkpoint nor weights that `sas-megatron checkpoint import` wrote",
            "name one of these, for example run/checkpoints/iter_0001000, or a run directory",
        )
    with offering_another_checkpoint(checkpoint, suggest_initial_weights):
        saved = read_checkpoint_config(checkpoint)
    actual = describe_architecture(saved.model, saved.attention)
    raise_if_architectures_differ(actual, expected, origin=checkpoint)
    raise_if_vocab_padding_differs(saved.model, config.model, origin=checkpoint)
    return WeightsSource(checkpoint, is_checkpoint=True)


def suggest_initial_weights(other: Path) -> str:
    """Return a suggestion for `offering_another_checkpoint` of a run that starts from its weights."""
    return f"set checkpoint.initial_weights={other}"


def _with_defaults(stored: Architecture, config: RunConfig) -> Architecture:
    """Add the defaults of fields that the earlier version which recorded an architecture did not have."""
    sections = {"model": config.model, "attention": config.attention}
    defaults = {
        name: {field: about.default for field, about in type(section).model_fields.items()}
        for name, section in sections.items()
    }
    return {name: {**defaults[name], **fields} for name, fields in stored.items()}


def read_checkpoint_config(checkpoint: Path) -> RunConfig:
    """Read the config of the run that saved a checkpoint.

    Raises:
        FileProblem: The manifest or the config is damaged, or this version does not read the config.
    """
    files = read_manifest(checkpoint).files
    # All ranks together verify the other files when they load them.
    raise_if_damaged(checkpoint, find_damage(checkpoint, {CONFIG: files[CONFIG]}))
    try:
        return load_run_config(checkpoint / CONFIG)
    except UserError as error:
        raise FileProblem(
            checkpoint / CONFIG,
            f"is not a valid config for this version ({error})",
            "use the version of the package that wrote it",
        ) from None
