"""The final report of a run that stopped: which ranks failed, where, and after which step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# Part of the messages of gloo and of the store after a timeout; they differ in the first letter.
TIMED_OUT = "imed out"


class StatusKind(StrEnum):
    """The kinds of status that a rank reports after a failure."""

    FAILED = "failed"  # raised an error of its own
    CONNECTION_LOST = "lost"  # in a collective that another rank broke or never joined
    TERMINATED = "terminated"  # by a signal or the end of its launcher; the text states which
    RUNNING = "running"  # alive; the text is the line of code that it executes


@dataclass(frozen=True)
class Activity:
    """What the ranks do together: the subject of the final report, and the remedy for an end of it."""

    name: str
    remedy: str
    has_steps: bool = True


TRAINING = Activity("training", "resume from the last checkpoint with checkpoint.resume=true")
# A command that changes no run, such as an evaluation.
COMMAND = Activity("the command", "run it again", has_steps=False)


@dataclass(frozen=True)
class StatusReport:
    """The status that a rank reports; `text` is one line."""

    kind: StatusKind
    text: str


@dataclass(frozen=True)
class RankStatus:
    """The known state of one rank. A field that the rank has not reported is None."""

    rank: int
    host: str | None
    last_step: int | None
    report: StatusReport | None


def is_hang(reports: Iterable[StatusReport | None]) -> bool:
    """Return whether a collective timed out or a rank reported no status, given the reports of all ranks."""
    return any(
        report is None or (report.kind == StatusKind.CONNECTION_LOST and TIMED_OUT in report.text)
        for report in reports
    )


def describe_stop(
    statuses: Sequence[RankStatus],
    *,
    timeout_minutes: float,
    flight_records: Path | None = None,
    activity: Activity = TRAINING,
) -> str:
    """Return one line about the end of a run: the last step, the failed ranks, the reason and the remedy.

    Args:
        statuses: The status of each rank.
        timeout_minutes: `training.collective_timeout_minutes`.
        flight_records: The directory to which ranks that hung wrote their flight records.
        activity: What has ended.
    """
    steps = [status.last_step for status in statuses if status.last_step is not None]
    begin = _begin(activity, max(steps) if steps else None)
    findings = _describe_failed(statuses) + _describe_silent(statuses)
    timed_out = any(TIMED_OUT in text for text in _texts_of_kind(statuses, StatusKind.CONNECTION_LOST))
    if timed_out and not findings:
        findings = _describe_stragglers(statuses)
    if timed_out:
        findings.append(
            f"the others waited {timeout_minutes:g} minutes in a collective "
            "(training.collective_timeout_minutes)"
        )
    findings = findings or _describe_terminated(statuses) or _describe_lost(statuses)
    if flight_records is not None and is_hang(status.report for status in statuses):
        findings.append(f"each rank's last collectives are in {flight_records}")
    return f"{begin}: {'; '.join(findings)}; {activity.remedy}"


def describe_lost_store(address: str, last_step: int | None, activity: Activity = TRAINING) -> str:
    """Return the line to print if the store itself is lost, so that no status of other ranks can be read."""
    return (
        f"{_begin(activity, last_step)}: the store of this run at {address} cannot be reached, so the other "
        "ranks' status is unknown; rank 0, its launcher or its host ended first: check their logs"
    )


def _begin(activity: Activity, last_step: int | None) -> str:
    if not activity.has_steps:
        return f"{activity.name} stopped"
    return f"{activity.name} stopped {'during startup' if last_step is None else f'after step {last_step}'}"


def _describe_failed(statuses: Sequence[RankStatus]) -> list[str]:
    failed = _texts_of_kind(statuses, StatusKind.FAILED)
    return [f"{_name_ranks(ranks)} failed: {text}" for text, ranks in failed.items()]


def _describe_silent(statuses: Sequence[RankStatus]) -> list[str]:
    silent = [status for status in statuses if status.report is None]
    return [f"{_name_ranks(silent)} reported no status (dead or hung)"] if silent else []


def _describe_stragglers(statuses: Sequence[RankStatus]) -> list[str]:
    """Name the running ranks, which have not reached the collective that timed out on the others."""
    stragglers = _texts_of_kind(statuses, StatusKind.RUNNING)
    return [f"{_name_ranks(ranks)} was still at {line}" for line, ranks in stragglers.items()] or [
        "every rank waits in a collective: either in different ones, or for a slow network"
    ]


def _describe_terminated(statuses: Sequence[RankStatus]) -> list[str]:
    terminated = _texts_of_kind(statuses, StatusKind.TERMINATED)
    return [f"{_name_ranks(ranks)} {reason}" for reason, ranks in terminated.items()]


def _describe_lost(statuses: Sequence[RankStatus]) -> list[str]:
    lost = _texts_of_kind(statuses, StatusKind.CONNECTION_LOST)
    return [f"{_name_ranks(ranks)} lost a connection: {text}" for text, ranks in lost.items()]


def _texts_of_kind(statuses: Sequence[RankStatus], kind: StatusKind) -> dict[str, list[RankStatus]]:
    """Return the ranks that reported a status of this kind, by its text."""
    by_text: dict[str, list[RankStatus]] = defaultdict(list)
    for status in statuses:
        if status.report is not None and status.report.kind == kind:
            by_text[status.report.text].append(status)
    return by_text


def _name_ranks(statuses: Sequence[RankStatus]) -> str:
    """Return `rank 3 on node07 (last finished step 17)`, with ranks of the same host and step joined."""
    groups: dict[tuple[str | None, int | None], list[int]] = defaultdict(list)
    for status in statuses:
        groups[status.host, status.last_step].append(status.rank)
    return ", ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {join_ranges(ranks)} on {host or 'an unknown host'} "
        f"({'no finished step' if step is None else f'last finished step {step}'})"
        for (host, step), ranks in groups.items()
    )


def join_ranges(ranks: Iterable[int]) -> str:
    """Return ascending ranks as text with ranges, such as `0-3, 6`."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)
