"""Results as JSON lines, one for each fault, and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["caught", "survived", "timed out", "broken", "not measured"]
# A fault with which the tests hang or cannot be imported counts as caught.
CAUGHT: tuple[Outcome, ...] = ("caught", "timed out", "broken")
_COLUMNS = ("name", "package", "fault", "outcome", "by which test", "seconds")


@dataclass(frozen=True)
class Result:
    """The outcome of the tests for one fault.

    `test` is the id of the first test that failed; for `broken`, the file that could not be collected.
    """

    name: str
    package: str
    fault: str
    outcome: Outcome
    test: str | None
    seconds: float
    # The commit of the mutated source, and the selection of tests: `default` or `all`.
    commit: str
    selection: str


def append_result(path: Path, result: Result) -> None:
    """Append a result to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def read_results(path: Path, *, commit: str, selection: str) -> dict[str, Result]:
    """Return the last result of each fault for a commit and a selection, by name of the fault."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):
            continue  # truncated when the tool was killed, or written by another version of it
        if (result.commit, result.selection) == (commit, selection):
            found[result.name] = result
    return found


def format_table(results: Iterable[Result]) -> str:
    """Return a Markdown table of the results."""
    rows = [
        (
            result.name,
            result.package,
            result.fault,
            result.outcome,
            f"`{result.test}`" if result.test else "",
            f"{result.seconds:.0f}",
        )
        for result in results
    ]
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def summarize(results: Iterable[Result]) -> str:
    """Return the number of faults that were caught, and how many by a hang or an import error."""
    outcomes = [result.outcome for result in results]
    caught = sum(outcome in CAUGHT for outcome in outcomes)
    details = [
        f"{outcomes.count(outcome)} {text}"
        for outcome, text in (
            ("timed out", "of them by the time limit"),
            ("broken", "of them because tests could not be collected"),
            ("not measured", "not measured"),
        )
        if outcome in outcomes
    ]
    return "; ".join([f"{caught} of {len(outcomes)} faults caught", *details])
