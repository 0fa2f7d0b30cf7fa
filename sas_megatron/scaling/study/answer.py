"""The answer of a study in a few sentences, with which its report opens."""

from __future__ import annotations

from collections.abc import Sequence

from sas_megatron.scaling.numbers import format_difference
from sas_megatron.scaling.outcomes import AXIS_NAMES, Axis
from sas_megatron.scaling.study.analysis import SliceAnalysis
from sas_megatron.scaling.study.study_table import StudyTable
from sas_megatron.scaling.verdicts import Verdict

VERBS = {
    "wins": ("wins against {baseline}", "win against {baseline}"),
    "loses": ("loses to {baseline}", "lose to {baseline}"),
    "inconclusive": ("is not shown to differ from {baseline}", "are not shown to differ from {baseline}"),
    "none": ("cannot be compared", "cannot be compared"),
}


def answer_study(table: StudyTable, analyses: Sequence[SliceAnalysis]) -> tuple[str, ...]:
    """Return at most five sentences: the results at equal tokens, FLOPs and time, and their limits."""
    compared = [analysis for analysis in analyses if analysis.comparisons]
    if not compared:
        return ("No variant can be compared yet.",)
    sentences = [_describe(table.baseline, compared, axis) + "." for axis in ("params", "flops", "seconds")]
    half = _describe(table.baseline, compared, "causal_flops")
    if half.partition(", ")[2] != sentences[1].partition(", ")[2].rstrip("."):
        sentences[1] = f"{sentences[1].rstrip('.')}; {half[0].lower()}{half[1:]}."
    else:
        sentences[1] = sentences[1].replace("At equal FLOPs", "At equal FLOPs, counted either way")
    degrees = [
        verdict.estimate.degrees
        for analysis in compared
        for comparison in analysis.comparisons
        for verdict in comparison.verdicts
        if verdict.estimate is not None and verdict.estimate.degrees is not None
    ]
    if degrees:
        sentences.append(
            "Seeds, not runs, are the repetitions: the tests have "
            f"{_format_range(min(degrees), max(degrees))} degrees of freedom."
        )
    else:
        sentences.append("The noise is unknown, since no variant has two seeds.")
    if table.withdrawn:
        sentences.append(f"The results of {', '.join(table.withdrawn)} are withdrawn.")
    return tuple(sentences)


def _describe(baseline: str, analyses: Sequence[SliceAnalysis], axis: Axis) -> str:
    slices: dict[str, list[str]] = {}
    for analysis in analyses:
        verdicts = [comparison.verdict(axis) for comparison in analysis.comparisons]
        groups = {
            result: [verdict for verdict in verdicts if _classify(verdict) == result] for result in VERBS
        }
        if len(groups["none"]) == len(verdicts):
            text = "no variant can be compared"
        else:
            text = ", and ".join(
                _join(baseline, result, chosen) for result, chosen in groups.items() if chosen
            )
        slices.setdefault(text, []).append(analysis.slice.name)
    parts = [
        text if len(slices) == 1 else f"with {' and '.join(names)}, {text}" for text, names in slices.items()
    ]
    return f"At equal {AXIS_NAMES[axis]}, {'; '.join(parts)}"


def _classify(verdict: Verdict) -> str:
    return "none" if verdict.estimate is None else verdict.result


def _join(baseline: str, result: str, verdicts: Sequence[Verdict]) -> str:
    names = [
        verdict.candidate
        + ("" if verdict.difference is None else f" ({format_difference(verdict.difference)})")
        for verdict in verdicts
    ]
    verb = VERBS[result][len(verdicts) > 1].format(baseline=baseline)
    return f"{', '.join(names)} {verb}"


def _format_range(low: float, high: float) -> str:
    ends = f"{low:.2g}", f"{high:.2g}"
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
