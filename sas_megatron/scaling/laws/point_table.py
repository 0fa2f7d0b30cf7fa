"""Points of a law from a table: text with commas, semicolons or tabs, JSON lines, or Parquet.

file -> format by content -> columns of text -> checked numbers -> points

A spreadsheet damages tables in ways that still parse: decimal commas and thousands separators shift fields,
and pasted rows count twice. Such tables are refused by line and column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.scaling.laws.points import Points, describe_valid, is_valid
from sas_megatron.scaling.laws.table_formats import Table, load_table

REQUIRED = ("params", "tokens", "loss")
OPTIONAL = ("flops", "size", "run", "variant", "epochs")
ROLES = (*REQUIRED, *OPTIONAL)


class _Column(NamedTuple):
    """A column of the table in a role: its name there and its values."""

    name: str
    values: Sequence[str]


def parse_columns(text: str) -> dict[str, str]:
    """Parse `params=Model Size,tokens=D`: the name of a column for each role.

    Raises:
        FieldError: The text is not of this form, or names a role twice.
    """
    starts = list(re.finditer(rf"(?:^|,)\s*({'|'.join(ROLES)})\s*=", text))
    ends = [match.start() for match in [*starts, *re.finditer("$", text)]][1:]
    columns: dict[str, str] = {}
    for match, end in zip(starts, ends, strict=False):
        columns.setdefault(match[1], text[match.end() : end].strip())
    if not starts or starts[0].start() != 0 or len(columns) < len(starts) or not all(columns.values()):
        raise FieldError(
            "--columns",
            text,
            f"must assign a column of the table to each of some of {', '.join(ROLES)}",
            'use, for example, --columns params="Model Size",tokens=D',
        )
    return columns


def read_points(
    path: str | Path, *, variant: str | None = None, columns: Mapping[str, str] | None = None
) -> Points:
    """Read the points of one variant.

    Args:
        path: The table. Its columns are params, tokens and loss, and optionally flops, size, run (checkpoints
            of one run are not independent), variant and epochs.
        variant: The variant to read, if the table contains several.
        columns: Names of columns in the table, where they differ from these.

    Raises:
        FileProblem: The file cannot be read, lacks a column, or has a row that is not valid.
        FieldError: The file contains several variants and none is chosen, or not the chosen one; it lacks a
            column of `columns`; or a run has several sizes.
    """
    names = {role: (columns or {}).get(role, role) for role in ROLES}
    table = load_table(path, wanted=tuple(names.values()))
    _check_columns(path, table, names, chosen=columns or {})
    columns_by_role = {
        role: _Column(name, table.columns[name]) for role, name in names.items() if name in table.columns
    }
    kept = _choose_variant(columns_by_role.get("variant"), variant, count=len(table.places))
    _check_repeats(path, table, kept)
    numbers = {
        role: _read_numbers(path, table.places, columns_by_role[role], role, kept)
        for role in (*REQUIRED, "flops", "epochs")
        if role in columns_by_role
    }
    labels = {
        role: _read_labels(path, table.places, columns_by_role[role], kept)
        for role in ("size", "run")
        if role in columns_by_role
    }
    return Points.of(
        numbers["params"],
        numbers["tokens"],
        numbers["loss"],
        flops=numbers.get("flops"),
        sizes=labels.get("size"),
        runs=labels.get("run"),
        epochs=numbers.get("epochs"),
    )


def _check_columns(
    path: str | Path, table: Table, names: Mapping[str, str], *, chosen: Mapping[str, str]
) -> None:
    found = f"contains {', '.join(table.columns)}" if table.columns else "is empty"
    for role, name in chosen.items():
        if name not in table.columns:
            raise FieldError(
                "--columns", f"{role}={name}", f"{path} has no column {name}, it {found}", "name one of these"
            )
    missing = [role for role in REQUIRED if names[role] not in table.columns]
    if missing:
        raise FileProblem(
            path,
            f"has no column {', '.join(missing)}",
            f"its first line must contain {','.join(REQUIRED)}, and may contain {', '.join(OPTIONAL)}, but "
            f"it {found}; name its columns with --columns {missing[0]}=NAME",
        )
    if not table.places:
        raise FileProblem(path, "has no points", "add a line for each run")


def _choose_variant(column: _Column | None, variant: str | None, *, count: int) -> list[int]:
    """Return the indices of the rows of the variant."""
    if column is None:
        if variant is not None:
            raise FieldError("--variant", variant, "the points have no column variant", "omit the option")
        return list(range(count))
    present = sorted(set(column.values))
    if variant is None and len(present) == 1:
        return list(range(count))
    if variant not in present:
        raise FieldError(
            "--variant",
            variant,
            f"a law is fitted to one variant, but the points contain {', '.join(present)}",
            "choose one of these",
        )
    return [row for row, value in enumerate(column.values) if value == variant]


def _check_repeats(path: str | Path, table: Table, kept: Sequence[int]) -> None:
    """Check that no two rows agree in all columns."""
    columns = list(table.columns.values())
    first: dict[tuple[str, ...], int] = {}
    for row in kept:
        earlier = first.setdefault(tuple(column[row] for column in columns), row)
        if earlier != row:
            raise FileProblem(
                path,
                f"{table.places[row]}: repeats {table.places[earlier]}",
                "remove it, or add a column, such as seed, that distinguishes the two runs",
            )


def _read_numbers(
    path: str | Path, places: Sequence[str], column: _Column, role: str, kept: Sequence[int]
) -> np.ndarray:
    values = np.array([_parse(column.values[row]) for row in kept], dtype=float)
    for index in np.flatnonzero(~is_valid(values))[:1]:
        row = kept[index]
        text = column.values[row]
        rule, remedy = describe_valid(role, float(values[index]))
        if np.isnan(values[index]) and re.search(r"\d[,' \u00a0\u202f]\d", text):
            remedy = "write it with a decimal point and without thousands separators"
        raise FileProblem(path, f"{places[row]}: {column.name}={text or 'nothing'}: {rule}", remedy)
    return values


def _read_labels(path: str | Path, places: Sequence[str], column: _Column, kept: Sequence[int]) -> list[str]:
    for row in kept:
        if not column.values[row]:
            raise FileProblem(
                path, f"{places[row]}: {column.name}=nothing: must be a name", "name it, or remove the column"
            )
    return [column.values[row] for row in kept]


def _parse(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
