"""What a check found: in one line, with the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a finding bears on training."""

    FINE = "fine"
    WARNING = "warning"  # training would go, but slowly or at risk
    FAILURE = "failure"  # training would fail


@dataclass(frozen=True)
class Finding:
    """One check on one node, or on all ranks; `remedy` is empty only where all is fine."""

    check: str
    verdict: Verdict
    observed: str
    remedy: str = ""
    place: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.verdict == Verdict.FINE, f"{self.check}: a finding names its remedy"


def fine(check: str, observed: str) -> Finding:
    """Nothing to mend."""
    return Finding(check, Verdict.FINE, observed)


def warning(check: str, observed: str, remedy: str) -> Finding:
    """Training would go, but slowly or at risk."""
    return Finding(check, Verdict.WARNING, observed, remedy)


def failure(check: str, observed: str, remedy: str) -> Finding:
    """Training would fail."""
    return Finding(check, Verdict.FAILURE, observed, remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict; fine where there is none."""
    order = list(Verdict)
    return max((finding.verdict for finding in findings), key=order.index, default=Verdict.FINE)
