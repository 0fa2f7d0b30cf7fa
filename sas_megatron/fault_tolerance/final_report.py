"""What is said when a run stops: which ranks are at fault, where, and after which step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# What gloo and the store write when a wait is over; the first letter differs.
TIMED_OUT = "imed out"


class AnswerKind(StrEnum):
    """What a rank tells of itself at a roll call."""

    FAILED = "failed"  # an error of its own
    LOST = "lost"  # a collective that another rank broke or never joined
    TOLD = "told"  # to end, by the launcher or a person; the text says how
    STANDS = "stands"  # alive; the text is the line of code it is at


@dataclass(frozen=True)
class Answer:
    """What a rank tells of itself; `text` is one line."""

    kind: AnswerKind
    text: str


@dataclass(frozen=True)
class Standing:
    """What is known of one rank; None where it left no word."""

    rank: int
    host: str | None
    last_step: int | None
    answer: Answer | None


def is_hang(standings: Sequence[Standing]) -> bool:
    """Whether ranks waited in vain: for others in a collective, or for an answer."""
    lost = _answered(standings, AnswerKind.LOST)
    return any(TIMED_OUT in text for text in lost) or any(rank.answer is None for rank in standings)


def describe_stop(
    standings: Sequence[Standing], *, timeout_minutes: float, flight_records: Path | None = None
) -> str:
    """One line for the end of a run: after which step, the ranks at fault, the reason, the remedy.

    Args:
        standings: All ranks, or as many as could be asked.
        timeout_minutes: `training.collective_timeout_minutes`.
        flight_records: Where ranks that hung left their flight recorder's entries.
    """
    steps = [standing.last_step for standing in standings if standing.last_step is not None]
    begin = f"training stopped after step {max(steps)}" if steps else "training stopped while starting"
    findings = _name_failed(standings) + _name_absent(standings)
    timed_out = any(TIMED_OUT in text for text in _answered(standings, AnswerKind.LOST))
    if timed_out and not findings:
        findings = _name_stragglers(standings)
    if timed_out:
        findings.append(
            f"the others waited {timeout_minutes:g} minutes in a collective "
            "(training.collective_timeout_minutes)"
        )
    findings = findings or _name_told(standings) or _name_lost(standings)
    if flight_records is not None and is_hang(standings):
        findings.append(f"each rank's last collectives are in {flight_records}")
    return f"{begin}: {'; '.join(findings)}; go on from the last checkpoint with checkpoint.resume=true"


def describe_lost_store(address: str, last_step: int | None) -> str:
    """The line where no rank can be asked, as the store itself is gone."""
    step = "while starting" if last_step is None else f"after step {last_step}"
    return (
        f"training stopped {step}: the store of this run at {address} is gone, so no rank can be asked; "
        "rank 0, its launcher or its host ended first: look there"
    )


def _name_failed(standings: Sequence[Standing]) -> list[str]:
    failed = _answered(standings, AnswerKind.FAILED)
    return [f"{_name(alike)} failed: {text}" for text, alike in failed.items()]


def _name_absent(standings: Sequence[Standing]) -> list[str]:
    absent = [standing for standing in standings if standing.answer is None]
    return [f"{_name(absent)} did not answer, being dead or hung"] if absent else []


def _name_stragglers(standings: Sequence[Standing]) -> list[str]:
    """Those alive that have not given up waiting: they never came to where the others waited."""
    stragglers = _answered(standings, AnswerKind.STANDS)
    return [f"{_name(alike)} stayed at {place}" for place, alike in stragglers.items()] or [
        "no rank is missing, so they wait in different collectives or for a slow network"
    ]


def _name_told(standings: Sequence[Standing]) -> list[str]:
    told = _answered(standings, AnswerKind.TOLD)
    return [f"{_name(alike)} {how}" for how, alike in told.items()]


def _name_lost(standings: Sequence[Standing]) -> list[str]:
    lost = _answered(standings, AnswerKind.LOST)
    return [f"{_name(alike)} lost a connection: {text}" for text, alike in lost.items()]


def _answered(standings: Sequence[Standing], kind: AnswerKind) -> dict[str, list[Standing]]:
    """Text -> the ranks that answered with it."""
    by_text: dict[str, list[Standing]] = defaultdict(list)
    for standing in standings:
        if standing.answer is not None and standing.answer.kind == kind:
            by_text[standing.answer.text].append(standing)
    return by_text


def _name(standings: Sequence[Standing]) -> str:
    """`rank 3 on node07 (last finished step 17)`, neighbours of a host and step together."""
    places: dict[tuple[str | None, int | None], list[int]] = defaultdict(list)
    for standing in standings:
        places[standing.host, standing.last_step].append(standing.rank)
    return ", ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {join_ranges(ranks)} "
        f"on {host or 'an unknown host'} ({'no step' if step is None else f'last finished step {step}'})"
        for (host, step), ranks in places.items()
    )


def join_ranges(ranks: Iterable[int]) -> str:
    """Ascending ranks in short: `0-3, 6`."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)
