"""Hints for unknown keys: similar keys, options of Megatron-LM, keys of other attention kinds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sas_megatron.config.attention import AttentionConfig, resolve_kind
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import UserError
from sas_megatron.config.megatron_flags import describe_flag
from sas_megatron.config.run import RunConfig

# Similarity of two names (difflib) from which one is offered for the other: a letter or two differ.
SIMILAR = 0.75


def describe_unknown_key(path: str, value: Any = None, tree: Mapping[str, Any] | None = None) -> str:
    """Return what to write instead of a key that does not exist.

    Args:
        path: The dotted name of the key.
        value: Its value.
        tree: The sections of the config.
    """
    name = path.rsplit(".", 1)[-1].replace("-", "_")
    known = known_keys(tree)
    if path.rpartition(".")[0] in known and path.count(".") > 1:  # a field of a field
        return f"did you mean {path.rpartition('.')[0]}?"
    kinds = _kinds_by_field()
    flag = describe_flag(name, value, tree or {})
    if flag is not None:
        return flag
    same_name = [key for key in known if key.rsplit(".", 1)[-1] == name]
    if same_name:
        return f"did you mean {same_name[0]}?"
    if name in kinds:
        return f"{_describe_kinds(name, kinds[name], tree)}"
    nearest = _find_nearest(path, [*known, *(f"attention.{field}" for field in kinds)])
    if nearest in known:
        return f"did you mean {nearest}?"
    if nearest is not None:
        field = nearest.rpartition(".")[2]
        return f"did you mean {nearest}? {_describe_kinds(field, kinds[field], tree)}"
    section = path.partition(".")[0]
    fields = [key.partition(".")[2] for key in known if key.startswith(f"{section}.")]
    if fields:
        return f"{name} is not offered; the fields of {section} are {', '.join(fields)}"
    return f"known sections: {', '.join(RunConfig.model_fields)}"


def known_keys(tree: Mapping[str, Any] | None = None) -> list[str]:
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


def _find_nearest(path: str, keys: list[str]) -> str | None:
    """Return the key of the same depth with the most similar last name; None if there is no similar one.

    A section that both have in common makes no key similar: training.fp8 is not like training.seed.
    """
    section, _, name = path.rpartition(".")
    best: tuple[float, bool] = (SIMILAR, False)
    nearest = None
    for key in keys:
        key_section, _, key_name = key.rpartition(".")
        if bool(key_section) != bool(section):
            continue
        similarity = difflib.SequenceMatcher(None, name, key_name).ratio()
        if (similarity, key_section == section) > best:
            best, nearest = (similarity, key_section == section), key
    return nearest


def _kinds_by_field() -> dict[str, list[str]]:
    """Return the attention kinds that have a field which not all kinds have, by the field."""
    common = set(AttentionConfig.model_fields)
    kinds: dict[str, list[str]] = {}
    for kind in sorted(KINDS):
        for field in resolve_kind(kind).model_fields:
            if field not in common:
                kinds.setdefault(field, []).append(kind)
    return kinds


def _describe_kinds(field: str, kinds: list[str], tree: Mapping[str, Any] | None) -> str:
    section = (tree or {}).get("attention")
    kind = section.get("kind") if isinstance(section, dict) else None
    here = f", and this run has attention.kind={kind}" if isinstance(kind, str) else ""
    return f"attention.{field} belongs to attention.kind={' or '.join(kinds)}{here}"


def _attention_class(tree: Mapping[str, Any] | None) -> type[AttentionConfig]:
    section = (tree or {}).get("attention")
    kind = section.get("kind") if isinstance(section, dict) else None
    try:
        return resolve_kind(kind) if isinstance(kind, str) else AttentionConfig
    except UserError:
        return AttentionConfig
