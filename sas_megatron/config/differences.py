"""The fields in which configs differ, by dotted name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sas_megatron.config.run import RunConfig


def find_differences(
    configs: Sequence[RunConfig], *, but: tuple[str, ...] = ()
) -> dict[str, tuple[Any, ...]]:
    """Dotted fields that are not equal in all `configs`, with each config's value; None where it has none.

    Args:
        configs: In the order of the values.
        but: Beginnings of the names that are left out.
    """
    trees = [flatten_config(config) for config in configs]
    names = dict.fromkeys(name for tree in trees for name in tree if not name.startswith(but))
    values = {name: tuple(tree.get(name) for tree in trees) for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def flatten_config(config: RunConfig) -> dict[str, Any]:
    """The values of a config, as JSON takes them, by dotted name."""
    return _flatten(config.model_dump(mode="json"), prefix="")


def _flatten(tree: dict[str, Any], *, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
