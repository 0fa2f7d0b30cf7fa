"""Load, override, dump and compare run configs.

YAML file + dotted overrides -> nested mappings -> `RunConfig`, or a `UserError` that lists every wrong field
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from sas_megatron.config.errors import FileProblem, UserError, shorten, translate_os_errors
from sas_megatron.config.hints import describe_unknown_key
from sas_megatron.config.run import RunConfig
from sas_megatron.config.shipped_configs import find_config
from sas_megatron.config.yaml_text import MAX_FILE_BYTES, parse_yaml

MAX_LISTED_PROBLEMS = 20
# The key of a config that names the file whose fields it starts from.
BASE = "base"
MAX_BASES = 10
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
    tree = read_run_tree(path)
    apply_overrides(tree, overrides or [])
    return build_run_config(tree)


def read_run_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the sections of a run's config, with those of its `base` where it does not set them.

    `base` is a path relative to the folder of the file that contains it, and may have a base itself. Fields
    are merged one by one, except that an attention section of another kind replaces that of the base.

    Raises:
        FileProblem: A file cannot be read or is not YAML, or the bases have no end.
    """
    chain = [Path(path)]
    trees = []
    while True:
        tree = read_yaml(chain[-1])
        base = _find_base(chain[-1], tree.pop(BASE, None))
        trees.append(tree)
        if base is None:
            break
        if len(chain) == MAX_BASES or base.resolve() in [file.resolve() for file in chain]:
            loop = " -> ".join(map(str, [*chain, base]))
            raise FileProblem(chain[-1], f"its base leads to {loop}", f"remove one {BASE}")
        chain.append(base)
    merged: dict[str, Any] = {}
    for tree in reversed(trees):
        _merge(merged, tree)
    return merged


def find_base(path: str | os.PathLike[str]) -> Path | None:
    """Return the file that a config names as its base; None if it has none.

    Raises:
        FileProblem: The config cannot be read, or its base does not exist.
    """
    return _find_base(Path(path), read_yaml(path).get(BASE))


def _find_base(path: Path, named: Any) -> Path | None:
    if named is None:
        return None
    if not isinstance(named, str):
        raise FileProblem(path, f"{BASE}={named}: is not the path of a file", f"write {BASE}: cluster.yaml")
    base = find_config(path).parent / named
    if not base.is_file():
        raise FileProblem(
            path,
            f"{BASE}={named}: names no file ({base})",
            "write a path relative to the folder of this file",
        )
    return base


def _merge(base: dict[str, Any], tree: dict[str, Any]) -> None:
    """Set the fields of `tree` in `base`."""
    for section, fields in tree.items():
        before: Any = base.get(section)
        can_merge = isinstance(before, dict) and isinstance(fields, dict)
        if can_merge and section == "attention":
            can_merge = fields.get("kind", before.get("kind")) == before.get("kind")
        base[section] = {**before, **fields} if can_merge else fields


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


def format_override(field: str, value: Any) -> str:
    """Return the override that sets a field to a value of JSON's types."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        is_plain = parse_yaml(text) == value
    except ValueError:
        is_plain = False
    return f"{field}={text if is_plain else json.dumps(value)}"


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
            raise UserError(f"{section} is a value, not a section; {describe_unknown_key(path)}")
    node[field] = value


def _describe(problem: Any, tree: dict[str, Any]) -> str:
    """Return the message for one pydantic error: field, value, rule, remedy."""
    path = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], shorten(repr(problem["input"]))
    if kind == "extra_forbidden":
        return f"{path}={value}: no such key; {describe_unknown_key(path, problem['input'], tree)}"
    if kind == "missing":
        return f"{path}: is required; add it"
    if kind == "literal_error":
        choices = problem["ctx"]["expected"].replace("True", "true").replace("False", "false")
        return f"{path}={value}: is not one of the choices; use {choices}"
    expected = problem["msg"].removeprefix("Input should be ").split(" or instance of ")[0]
    return f"{path}={value}: must be {expected}; {TYPE_REMEDIES.get(kind, f'use {expected}')}"


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
