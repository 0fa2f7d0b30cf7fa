"""The comparison as one self-contained HTML page: figure, table, verdicts, costs by term, provenance."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sas_megatron import __version__
from sas_megatron.config.loading import find_differences
from sas_megatron.scaling.comparison import Comparison, sum_terms
from sas_megatron.scaling.figure import draw_svg
from sas_megatron.scaling.numbers import MISSING, format_count, format_exact, format_share
from sas_megatron.scaling.runs import Run
from sas_megatron.scaling.table import Cell, Measure, build_measures

TEMPLATE = Path(__file__).with_name("report.html")


def describe_subject(runs: Sequence[Run]) -> str:
    """Corpus and size in one line, for titles."""
    baseline = runs[0]
    parts = [f"Loss on {_name_corpus(baseline)}"]
    parameters = sum_terms(baseline.summary.parameters)
    if parameters is not None:
        parts.append(f"{format_count(parameters)} parameters")
    parts.append(f"{format_count(baseline.summary.tokens)} tokens")
    return ", ".join(parts)


def render_page(runs: Sequence[Run], comparison: Comparison, *, title: str, written_at: datetime) -> str:
    """The report as one page that needs nothing beside it."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = [run.name for run in runs]
    verdicts = comparison.verdicts
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        names=names,
        measures=build_measures(comparison.rows),
        verdicts=verdicts,
        remarks=comparison.remarks,
        figure_text=(
            f"Three panels of validation and training loss for {', '.join(names)}: against tokens, against "
            f"training FLOPs, against training time. {' '.join(verdict.text for verdict in verdicts)}"
        ),
        # The only markup that is not escaped here: the SVG writer escapes its texts.
        wide_svg=Markup(draw_svg(runs, verdicts, stacked=False)),
        stacked_svg=Markup(draw_svg(runs, verdicts, stacked=True)),
        splits=(
            ("Parameters", split_terms([run.summary.parameters for run in runs])),
            (
                "Training FLOPs per token",
                split_terms([run.summary.training_flops_per_token for run in runs]),
            ),
        ),
        provenance=(*_list_differences(runs), *_list_provenance(runs)),
        commands=[describe_command(run) for run in runs],
        version=__version__,
        written_at=f"{written_at:%Y-%m-%d %H:%M %Z}",
    )


def split_terms(terms: Sequence[Mapping[str, float] | None]) -> tuple[Measure, ...]:
    """Each named term with its share of the run's total, and the total; what a run lacks is missing."""
    totals = [sum_terms(each) for each in terms]
    names = dict.fromkeys(name for each in terms if each for name in each)
    lines = [
        Measure(
            name.replace("_", " "),
            tuple(_share((each or {}).get(name), total) for each, total in zip(terms, totals, strict=True)),
        )
        for name in names
    ]
    return (*lines, Measure("total", tuple(Cell(format_exact(total)) for total in totals)))


def describe_command(run: Run) -> str:
    """The shell command that trains the run again, beside its first directory."""
    config = shlex.quote(str(run.directory / "config.yaml"))
    again = shlex.quote(f"logging.run_directory={run.config.logging.run_directory}-again")
    ranks = run.summary.world_size or 1
    start = "sas-megatron train" if ranks == 1 else f"launch/torchrun.sh {ranks}"
    return f"{start} {config} {again}"


def hash_config(run: Run) -> str:
    """Twelve hexadecimal digits that name the run's resolved config."""
    tree = json.dumps(run.config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(tree.encode()).hexdigest()[:12]


def _share(value: float | None, total: float | None) -> Cell:
    share = format_share(value / total) if value is not None and total else ""
    return Cell(format_exact(value), share)


def _list_differences(runs: Sequence[Run]) -> list[Measure]:
    return [
        Measure(key, tuple(Cell(_show(value)) for value in values))
        for key, values in find_differences([run.config for run in runs]).items()
    ]


def _list_provenance(runs: Sequence[Run]) -> list[Measure]:
    keys = dict.fromkeys(key for run in runs for key in run.provenance)
    return [
        Measure("config hash (SHA-256)", tuple(Cell(hash_config(run)) for run in runs)),
        Measure("training.seed", tuple(Cell(str(run.config.training.seed)) for run in runs)),
        *(
            Measure(key.replace("_", " "), tuple(Cell(_show(run.provenance.get(key))) for run in runs))
            for key in keys
        ),
    ]


def _show(value: Any) -> str:
    """A value of JSON as text for a cell, one line an entry."""
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_show(entry)}" for key, entry in value.items()) or MISSING
    if isinstance(value, list):
        return ", ".join(_show(entry) for entry in value) or MISSING
    return str(value)


def _name_corpus(run: Run) -> str:
    corpus = run.provenance.get("corpus")
    if isinstance(corpus, Mapping):
        corpus = corpus.get("name")
    return corpus if isinstance(corpus, str) and corpus else Path(run.config.data.prefixes[0]).name
