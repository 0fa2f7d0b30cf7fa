"""Load, override, dump and compare run configs.

YAML file + dotted overrides -> nested mappings -> `RunConfig`, or a `UserError` that lists every wrong field
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from sas_megatron.config.attention import AttentionConfig, resolve_kind
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FileProblem, UserError, shorten, translate_os_errors
from sas_megatron.config.run import RunConfig
from sas_megatron.config.shipped_configs import find_config
from sas_megatron.config.yaml_text import MAX_FILE_BYTES, parse_yaml

# Options of Megatron-LM -> the fields of this config, for hints in error messages.
MEGATRON_ALIASES: dict[str, str] = {
    "num_attention_heads": "attention.num_heads",
    "num_query_groups": "attention.num_kv_heads",
    "kv_channels": "attention.head_dim",
    "attention_dropout": "attention.dropout",
    "rotary_percent": "attention.rotary_dim",
    "position_embedding_type": "attention.rotary",
    "no_rope_freq": "attention.rotary",
    "padded_vocab_size": "model.vocab_size",
    "make_vocab_size_divisible_by": "model.vocab_multiple",
    "init_method_std": "model.init_std",
    "norm_eps": "model.norm_epsilon",
    "add_bias_linear": "model.linear_bias",
    "untie_embeddings_and_output_weights": "model.tie_embeddings",
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.sequence",
    "context_parallel_size": "parallel.context",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline",
    "decoder_first_pipeline_num_layers": "parallel.first_stage_layers",
    "decoder_last_pipeline_num_layers": "parallel.last_stage_layers",
    "overlap_grad_reduce": "parallel.overlap_gradient_reduce",
    "overlap_param_gather": "parallel.overlap_parameter_gather",
    "recompute_granularity": "training.recompute",
    "recompute_num_layers": "training.recompute_layers",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_position_embeddings": "data.sequence_length",
    "data_path": "data.prefixes",
    "data_cache_path": "data.index_cache",
    "tokenizer_model": "data.tokenizer",
    "reset_position_ids": "data.reset_at_document_ends",
    "reset_attention_mask": "data.reset_at_document_ends",
    "lr": "optimizer.learning_rate",
    "min_lr": "schedule.final_fraction",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "clip_grad": "optimizer.clip_gradient_norm",
    "use_distributed_optimizer": "optimizer.distributed",
    "lr_decay_style": "schedule.kind",
    "lr_warmup_iters": "schedule.warmup_steps",
    "train_iters": "training.num_steps",
    "bf16": "training.precision",
    "exit_interval": "training.stop_after_steps",
    "exit_duration_in_mins": "training.stop_after_seconds",
    "eval_interval": "evaluation.interval",
    "eval_iters": "evaluation.num_sequences",
    "save_interval": "checkpoint.interval",
    "log_interval": "logging.interval",
    "save": "logging.run_directory",
    "tensorboard_dir": "logging.tensorboard",
}

MAX_LISTED_PROBLEMS = 20
# Types of pydantic's errors -> the remedy.
TYPE_REMEDIES: dict[str, str] = {
    "int_type": "write a whole number, such as 4",
    "float_type": "write a number, such as 0.1",
    "finite_number": "write a number, such as 0.1",
    "bool_type": "write true or false",
    "string_type": "write text, in quotes if it looks like a number or a date",
    "list_type": "write a list, such as [a, b]",
    "dict_type": "write a mapping, such as {name: value}",
    "model_type": "write the section's fields as a mapping",
}


def load_run_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
    """Load a run's config from a YAML file.

    Args:
        path: YAML file with the sections of `RunConfig`.
        overrides: Entries `section.field=value` with the value in YAML; later entries override earlier ones.

    Raises:
        UserError: The file or an override is invalid; the message names the wrong fields.
    """
    tree = read_yaml(path)
    apply_overrides(tree, overrides or [])
    return build_run_config(tree)


def build_run_config(tree: dict[str, Any]) -> RunConfig:
    """Build a `RunConfig` from nested mappings.

    Raises:
        UserError: A field is missing, unknown or invalid; the message names the wrong fields.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(problem, tree) for problem in error.errors()]
        if len(lines) > MAX_LISTED_PROBLEMS:
            lines[MAX_LISTED_PROBLEMS - 1] += f" (and {len(lines) - MAX_LISTED_PROBLEMS} more problems)"
        raise UserError("\n".join(lines[:MAX_LISTED_PROBLEMS])) from None


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        FileProblem: The file cannot be read, is not YAML, or its top level is not a mapping.
    """
    with (
        translate_os_errors(path, problem="cannot be read", remedy="check the path"),
        find_config(path).open("rb") as file,
    ):
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise FileProblem(path, f"has more than {MAX_FILE_BYTES:,} bytes", "give a config or study file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileProblem(path, f"is not UTF-8 text ({error})", "give a YAML file") from None
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise FileProblem(path, str(error), "correct the file") from None
    if not isinstance(tree, dict):
        raise FileProblem(path, "has no sections", "start from one of the files in configs/")
    return tree


def dump_yaml(config: RunConfig) -> str:
    """Return the resolved config as YAML, from which `load_run_config` builds an equal config."""
    return dump_tree(config.model_dump(mode="json"))


def dump_tree(tree: dict[str, Any]) -> str:
    """Return nested mappings as YAML, with the keys in their original order."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    buffer = io.StringIO()
    writer.dump(tree, buffer)
    return buffer.getvalue()


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.field=value` entries, with the value in YAML, in nested mappings; later entries win.

    Raises:
        UserError: An entry is malformed.
    """
    for override in overrides:
        _apply_override(tree, override)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    name = f"override {shorten(repr(override))}"
    if not equals or len(path.split(".")) < 2 or not all(path.split(".")):
        raise UserError(
            f"{name}: must have the form section.field=value; write model.num_layers=4, for example"
        )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{name}: the value {error}; correct it, or quote it if it is text") from None
    try:
        set_field(tree, path, value)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def set_field(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path in nested mappings, and add the mappings that it lacks.

    Raises:
        UserError: A part of the path before the last names a value that is not a mapping.
    """
    *sections, field = path.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"{section} is a value, not a section; {_hint(path)}")
    node[field] = value


def _describe(problem: Any, tree: dict[str, Any]) -> str:
    """Return the message for one pydantic error: field, value, rule, remedy."""
    path = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], shorten(repr(problem["input"]))
    if kind == "extra_forbidden":
        return f"{path}={value}: no such key; {_hint(path, tree)}"
    if kind == "missing":
        return f"{path}: is required; add it"
    if kind == "literal_error":
        return f"{path}={value}: is not one of the choices; use {problem['ctx']['expected']}"
    expected = problem["msg"].removeprefix("Input should be ").split(" or instance of ")[0]
    return f"{path}={value}: must be {expected}; {TYPE_REMEDIES.get(kind, f'use {expected}')}"


def _hint(path: str, tree: dict[str, Any] | None = None) -> str:
    name = path.rsplit(".", 1)[-1].replace("-", "_")
    if name in MEGATRON_ALIASES:
        return f"did you mean {MEGATRON_ALIASES[name]}?"
    kinds = [kind for kind in KINDS if path in known_keys({"attention": {"kind": kind}})]
    if kinds:
        return f"it belongs to attention.kind={' or '.join(kinds)}"
    known = known_keys(tree)
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not nearest:
        by_name = {key.rsplit(".", 1)[-1]: key for key in known}
        nearest = [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)]
    return (
        f"did you mean {nearest[0]}?" if nearest else f"known sections: {', '.join(RunConfig.model_fields)}"
    )


def known_keys(tree: dict[str, Any] | None = None) -> list[str]:
    """Return every valid dotted key; those of the attention section depend on the kind that `tree` names."""
    keys: list[str] = []
    for section, field in RunConfig.model_fields.items():
        section_class: Any = field.annotation
        if section == "attention":
            section_class = _attention_class(tree)
        keys.append(section)
        if isinstance(section_class, type) and issubclass(section_class, BaseModel):
            keys.extend(f"{section}.{name}" for name in section_class.model_fields)
    return keys


def _attention_class(tree: dict[str, Any] | None) -> type[AttentionConfig]:
    section = (tree or {}).get("attention")
    kind = section.get("kind") if isinstance(section, dict) else None
    try:
        return resolve_kind(kind) if isinstance(kind, str) else AttentionConfig
    except UserError:
        return AttentionConfig


def find_differences(
    configs: Sequence[RunConfig], *, ignored: tuple[str, ...] = ()
) -> dict[str, tuple[Any, ...]]:
    """Return the dotted fields that are not equal in all `configs`.

    Args:
        configs: The configs to compare.
        ignored: Prefixes of dotted names to leave out.

    Returns:
        The value in each config, in the order of `configs`, by field; None in a config without the field.
    """
    trees = [flatten_config(config) for config in configs]
    names = dict.fromkeys(name for tree in trees for name in tree if not name.startswith(ignored))
    values = {name: tuple(tree.get(name) for tree in trees) for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def flatten_config(config: RunConfig, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """Return the values of a config by dotted name, as JSON types; optionally without defaults."""
    return _flatten(config.model_dump(mode="json", exclude_defaults=exclude_defaults), prefix="")


def _flatten(tree: dict[str, Any], *, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
