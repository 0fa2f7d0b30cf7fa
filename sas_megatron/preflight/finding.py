"""The result of one check: its severity, an observation, and a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """The effect of a finding on training, in increasing order of severity."""

    FINE = "fine"
    WARNING = "warning"  # training would work, but slowly or at risk
    FAILURE = "failure"  # training would fail


@dataclass(frozen=True)
class Finding:
    """The result of one check on one node, or on all ranks.

    Attributes:
        check: Name of the check.
        verdict: Its severity.
        observed: The observation, in one line.
        remedy: What to do about it; empty only if the verdict is fine.
        place: The host, or empty for a check of all ranks.
    """

    check: str
    verdict: Severity
    observed: str
    remedy: str = ""
    place: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.verdict == Severity.FINE, f"{self.check}: a problem must have a remedy"


def fine(check: str, observed: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, Severity.FINE, observed)


def warning(check: str, observed: str, remedy: str) -> Finding:
    """Return a finding with which training would work, but slowly or at risk."""
    return Finding(check, Severity.WARNING, observed, remedy)


def failure(check: str, observed: str, remedy: str) -> Finding:
    """Return a finding with which training would fail."""
    return Finding(check, Severity.FAILURE, observed, remedy)


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the highest severity; fine without findings."""
    order = list(Severity)
    return max((finding.verdict for finding in findings), key=order.index, default=Severity.FINE)
