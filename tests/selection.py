"""Selection of tests: the default run, all tests, or a part of all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def cases(names: Iterable[Any], *, default: Collection[Any]) -> list[Any]:
    """Return the parameters of a table of cases; the default run contains only the `default` ones.

    A case with several parameters is a tuple. Choose default cases so that every line of the product that the
    table reaches is also reached by a default case.

    Raises:
        ValueError: A default case is not in the table.
    """
    table = list(names)
    if unknown := sorted(map(str, set(default) - set(table))):
        raise ValueError(f"the table has no case {', '.join(unknown)}; it has {', '.join(map(str, table))}")

    def parameters(name: Any) -> Any:
        return pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=exhaustive)

    return [name if name in default else parameters(name) for name in table]


def draws(few: int, many: int) -> Any:
    """Parametrize `num_draws`: `few` in the default run, `many` in addition with --all."""
    return pytest.mark.parametrize("num_draws", [few, pytest.param(many, marks=exhaustive)])


def parse_part(text: str) -> tuple[int, int]:
    """Parse `i/n`, the i-th of n parts, counted from 1.

    Raises:
        ValueError: `text` is not such a pair.
    """
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part {text}: must be i/n with 1 <= i <= n; for example --part 1/4")
    return int(index), int(count)


def select(
    items: list[pytest.Item], *, run_all: bool, part: tuple[int, int] | None
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests that run, and the tests that run only with `tests/run.sh --all`.

    A part consists of complete files, since the tests of a file share fixtures. The tests of other parts are
    in neither list.
    """
    if part is not None:
        index, count = part
        files = sorted({item.nodeid.partition("::")[0] for item in items})
        in_part = set(files[index - 1 :: count])
        items = [item for item in items if item.nodeid.partition("::")[0] in in_part]
    if run_all:
        return items, []
    deselected = [item for item in items if item.get_closest_marker(exhaustive.name)]
    return [item for item in items if not item.get_closest_marker(exhaustive.name)], deselected
