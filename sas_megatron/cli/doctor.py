"""`sas-megatron doctor`: would training go here? One node, or an allocation under its launcher."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sas_megatron.preflight.examination import Examination
    from sas_megatron.preflight.finding import Finding

SIGNS = {"fine": "✓", "warning": "!", "failure": "✗"}


@click.command()
@click.argument("config", required=False, type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--run-directory", type=click.Path(path_type=Path), help="In place of the config's own (.).")
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
def doctor(
    config: str | None, overrides: tuple[str, ...], *, run_directory: Path | None, as_json: bool
) -> None:
    """Look for what would make training fail: versions, GPUs, limits, disk, names, ports, exchanges.

    With CONFIG, also whether it fits here; OVERRIDES read section.field=value. Alone it looks at this node;
    started as `train` is, by torchrun or srun with a process a GPU, at the whole allocation. Exits with
    status 1 if training would fail.
    """
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.platform.launcher import take_place
    from sas_megatron.preflight.examination import examine
    from sas_megatron.preflight.finding import Verdict, worst

    take_place()
    run_config = None if config is None else load_run_config(config, list(overrides))
    if run_directory is None:
        run_directory = Path("." if run_config is None else run_config.logging.run_directory)
    examination = examine(run_directory, run_config)
    if examination.speaks:
        click.echo(_as_json(examination) if as_json else _as_table(examination))
    sys.exit(worst(examination.findings) == Verdict.FAILURE)


def _as_json(examination: Examination) -> str:
    from sas_megatron.preflight.finding import worst

    record = {
        "schema": 1,
        "verdict": worst(examination.findings),
        "ranks": examination.num_ranks,
        "findings": [asdict(finding) for finding in examination.findings],
    }
    return json.dumps(record, indent=2)


def _as_table(examination: Examination) -> str:
    """A line for each thing found, what is to be mended last; what is alike on several nodes once."""
    places: dict[Finding, list[str]] = {}
    for finding in examination.findings:
        known = next((known for known in places if _stands_for(known, finding)), finding)
        places.setdefault(known, []).append(finding.place)
    ordered = sorted(places, key=lambda finding: list(SIGNS).index(finding.verdict))
    width = max(len(finding.check) for finding in ordered)
    lines = []
    for finding in ordered:
        others = len(places[finding]) - 1
        where = f" ({finding.place}{f' and {others} more' if others else ''})" if finding.place else ""
        lines.append(f"{SIGNS[finding.verdict]} {finding.check:<{width}}  {finding.observed}{where}")
        if finding.remedy:
            lines.append(f"  {'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def _stands_for(known: Finding, other: Finding) -> bool:
    """Whether one line tells of both: of what is fine the first node's figures do, else only equal ones."""
    if known.place == other.place or (known.check, known.verdict) != (other.check, other.verdict):
        return False
    return not known.remedy or (known.observed, known.remedy) == (other.observed, other.remedy)
