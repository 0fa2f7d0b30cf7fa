"""A base run with another attention: by its kind, or by the section of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sas_megatron.config.attention import parse_attention, resolve_kind
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.loading import read_yaml
from sas_megatron.config.run import RunConfig


def build_variant(base: RunConfig, wanted: str) -> tuple[str, RunConfig]:
    """A name, and `base` with the attention that is wanted; its run directory stands beside the base's.

    Args:
        base: the run whose other sections are kept.
        wanted: an attention kind, which its class models on the base, or a YAML file with a section
            `attention`.

    Raises:
        UserError: no such kind, or the file or the attention cannot be used.
    """
    if Path(wanted).suffix in (".yaml", ".yml"):
        tree = read_yaml(wanted)
        if "attention" not in tree:
            raise FileProblem(wanted, "has no section attention", "add one, with its kind")
        name, fields = Path(wanted).stem, tree["attention"]
    else:
        name, fields = wanted, model_attention(base, wanted)
    sections = {section: getattr(base, section) for section in RunConfig.model_fields}
    place = Path(base.logging.run_directory)
    logging = base.logging.model_copy(update={"run_directory": str(_beside(place, base, name))})
    return name, RunConfig(**{**sections, "attention": parse_attention(fields), "logging": logging})


def model_attention(base: RunConfig, kind: str) -> dict[str, Any]:
    """The section `attention` of a kind in the place of the base's; the base's own, where it is of that kind.

    Raises:
        UserError: no such kind.
    """
    if kind == base.attention.kind:
        return base.attention.model_dump(exclude_unset=True)
    variant = resolve_kind(kind)
    common = base.attention.model_dump(exclude_unset=True, include={"dropout", "backend"})
    return {
        "kind": kind,
        **common,
        **variant.defaults_from(base.attention, hidden_size=base.model.hidden_size),
    }


def _beside(place: Path, base: RunConfig, name: str) -> Path:
    """runs/125m/mha -> runs/125m/tpa; runs/first -> runs/first_tpa."""
    kind = base.attention.kind
    if place.name.endswith(kind):
        return place.with_name(place.name.removesuffix(kind) + name)
    return place.with_name(f"{place.name}_{name}")
