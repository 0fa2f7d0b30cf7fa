"""`sas-megatron doctor`: check whether training would work on a node or in an allocation."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sas_megatron.preflight.checks import PreflightReport
    from sas_megatron.preflight.finding import Finding

SIGNS = {"fine": "✓", "warning": "!", "failure": "✗"}


@click.command()
@click.argument("config", required=False, type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option(
    "--run-directory",
    type=click.Path(path_type=Path),
    help="Directory to check instead of the config's logging.run_directory, or of the current one.",
)
@click.option(
    "--layout",
    "compares_layout",
    is_flag=True,
    help="Instead of these checks, compare training at the layout of CONFIG with one process.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
def doctor(
    config: str | None,
    overrides: tuple[str, ...],
    *,
    run_directory: Path | None,
    compares_layout: bool,
    as_json: bool,
) -> None:
    """Check versions, GPUs, limits, disk, host names, ports and communication before training.

    With CONFIG, also check that the config is valid here; OVERRIDES have the form section.field=value. Run as
    a single process, it checks this node. Run like `train`, by torchrun or srun with one process per GPU, it
    checks the entire allocation. The exit status is 1 if training would fail.

    With --layout, started like `train`, it takes three steps of a small version of CONFIG in one process and
    at the layout of CONFIG, and compares initial weights, every gradient, and losses. It reads no data.

    \f
    Raises:
        FieldError: --layout is given without CONFIG.
    """
    from sas_megatron.config.errors import FieldError
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.platform.launcher import set_rank_from_slurm
    from sas_megatron.preflight.checks import compare_layout, run_preflight_checks
    from sas_megatron.preflight.finding import Severity, worst

    set_rank_from_slurm()
    run_config = None if config is None else load_run_config(config, list(overrides))
    if compares_layout:
        if run_config is None:
            raise FieldError("--layout", True, "needs a config", "name one: doctor --layout CONFIG")
        report = compare_layout(run_config, show=lambda report: _show(report, as_json=as_json))
    else:
        if run_directory is None:
            run_directory = Path("." if run_config is None else run_config.logging.run_directory)
        report = run_preflight_checks(run_directory, run_config)
    if report.is_printed:
        _show(report, as_json=as_json)
    sys.exit(worst(report.findings) == Severity.FAILURE)


def _show(report: PreflightReport, *, as_json: bool) -> None:
    click.echo(_as_json(report) if as_json else _as_table(report))
    sys.stdout.flush()


def _as_json(report: PreflightReport) -> str:
    from sas_megatron.preflight.finding import worst

    record = {
        "schema": 1,
        "verdict": worst(report.findings),
        "ranks": report.num_ranks,
        "findings": [asdict(finding) for finding in report.findings],
    }
    return json.dumps(record, indent=2)


def _as_table(report: PreflightReport) -> str:
    """Return one line per finding, failures last; findings that several nodes share are listed once."""
    hosts: dict[Finding, list[str]] = {}
    for finding in report.findings:
        listed = next((known for known in hosts if _is_same_finding(known, finding)), finding)
        hosts.setdefault(listed, []).append(finding.place)
    ordered = sorted(hosts, key=lambda finding: list(SIGNS).index(finding.verdict))
    width = max(len(finding.check) for finding in ordered)
    lines = []
    for finding in ordered:
        others = len(hosts[finding]) - 1
        where = f" ({finding.place}{f' and {others} more' if others else ''})" if finding.place else ""
        lines.append(f"{SIGNS[finding.verdict]} {finding.check:<{width}}  {finding.observed}{where}")
        if finding.remedy:
            lines.append(f"  {'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def _is_same_finding(known: Finding, other: Finding) -> bool:
    """Return whether one line can represent the findings of two nodes.

    For a check without a problem the first node's values are shown; problems must be equal.
    """
    if known.place == other.place or (known.check, known.verdict) != (other.check, other.verdict):
        return False
    return not known.remedy or (known.observed, known.remedy) == (other.observed, other.remedy)
