"""Configs that replace the attention of a base run, by kind or by the section of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sas_megatron.config.attention import MODIFIERS, parse_attention, resolve_kind
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import read_run_tree
from sas_megatron.config.run import RunConfig


def build_variant(base: RunConfig, attention: str) -> tuple[str, RunConfig]:
    """Return a name and `base` with another attention; its run directory is next to the base's.

    Args:
        base: The run whose other sections are kept.
        attention: An attention kind, with defaults that depend on the base, or a YAML file with a section
            `attention`.

    Raises:
        UserError: The kind is unknown, or the file or its attention is invalid.
    """
    if Path(attention).suffix in (".yaml", ".yml"):
        tree = read_run_tree(attention)
        if "attention" not in tree:
            raise FileProblem(attention, "has no section attention", "add one, with its kind")
        name, fields = Path(attention).stem, tree["attention"]
    else:
        name, fields = attention, default_attention(base, attention)
    sections = {section: getattr(base, section) for section in RunConfig.model_fields}
    logging = base.logging.model_copy(update={"run_directory": str(_name_directory(base, name))})
    return name, RunConfig(**{**sections, "attention": parse_attention(fields), "logging": logging})


def default_attention(base: RunConfig, kind: str) -> dict[str, Any]:
    """Return the section `attention` of a kind with defaults from the base; the base's own for its own kind.

    Modifiers of the base are kept, and biases of queries, keys and values if the kind supports them.

    Raises:
        UserError: The kind is unknown.
    """
    if kind == base.attention.kind:
        return base.attention.model_dump(exclude_unset=True)
    variant = resolve_kind(kind)
    kept = {"dropout", "backend", *MODIFIERS, *(["qkv_bias"] if variant.supports_qkv_bias else [])}
    common = base.attention.model_dump(exclude_unset=True, include=kept)
    return {
        "kind": kind,
        **common,
        **variant.defaults_from(base.attention, hidden_size=base.model.hidden_size),
    }


def scale_fields(fields: dict[str, Any], factors: dict[str, Any]) -> dict[str, Any]:
    """Return attention fields of which some are multiplied by a factor, such as twice as many heads.

    Args:
        fields: The section `attention`.
        factors: Factors by the name of a field.

    Raises:
        FieldError: A field has no number, a factor is not a number, or their product is not an integer.
    """
    scaled = dict(fields)
    for name, factor in factors.items():
        value = fields.get(name)
        if not isinstance(value, int) or not isinstance(factor, int | float) or value * factor % 1:
            raise FieldError(
                f"times.{name}",
                factor,
                f"must be a number whose product with attention.{name}={value} is an integer",
                "use another factor, or a base in which the field has a multiple of its divisor",
            )
        scaled[name] = int(value * factor)
    return scaled


def _name_directory(base: RunConfig, name: str) -> Path:
    """Return the run directory of a variant: runs/125m/mha -> runs/125m/tpa; runs/first -> runs/first_tpa."""
    directory, kind = Path(base.logging.run_directory), base.attention.kind
    if directory.name.endswith(kind):
        return directory.with_name(directory.name.removesuffix(kind) + name)
    return directory.with_name(f"{directory.name}_{name}")
