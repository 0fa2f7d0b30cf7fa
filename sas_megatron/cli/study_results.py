"""`sas-megatron study collect, report, export and import`: the results of studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sas_megatron.cli.study_files import (
    TABLE,
    json_option,
    load_plan,
    load_study_file,
    study_file,
    study_files,
)
from sas_megatron.config.errors import FieldError

if TYPE_CHECKING:
    from sas_megatron.scaling.study.record_exchange import Exchange
    from sas_megatron.scaling.study.study_table import StudyTable

_records = click.argument("records", type=click.Path(path_type=Path))


@click.command()
@study_file
@click.option("--output", type=click.Path(path_type=Path), help=f"Default: {TABLE} in the study's directory.")
@json_option
def collect(study: Path, *, output: Path | None, as_json: bool) -> None:
    """Collect the finished runs into one Parquet table.

    It is an error if runs differ in fields that STUDY does not vary.
    """
    from sas_megatron.scaling.study.collecting import collect as collect_table
    from sas_megatron.scaling.study.study_table import write_table

    planned = load_plan(study)()
    table = collect_table(planned)
    path = output or planned.directory / TABLE
    write_table(table, path)
    done = sum(row.status == "done" for row in table.rows)
    about: dict[str, Any] = {
        "table": str(path),
        "rows": len(table.rows),
        "done": done,
        "remarks": list(table.remarks),
    }
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    for remark in table.remarks:
        click.echo(f"· {remark}")
    click.echo(f"» {done} of {len(table.rows)} runs in {path}")


@click.command(short_help="Fit laws, compare variants, and write a report.")
@study_files
@click.option(
    "--records",
    type=click.Path(path_type=Path),
    help="Read the records in this folder (`study export`) instead of collected tables.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder. Default: report/ next to the table.")
@click.option(
    "--bootstraps", type=click.IntRange(min=50), default=1000, show_default=True, help="Bootstrap draws."
)
def report(studies: tuple[Path, ...], *, records: Path | None, output: Path | None, bootstraps: int) -> None:
    """Fit laws, compare variants, and write a page, figures and a summary from collected tables.

    STUDY is a study file, or the table that `study collect` wrote. Several studies with the same baseline
    make one report.

    \f
    Raises:
        FieldError: Several studies, or records, are named without --output.
    """
    from sas_megatron.scaling.study.merged_tables import merge_tables
    from sas_megatron.scaling.study.study_report import write_study_report
    from sas_megatron.scaling.study.study_table import read_table

    if output is None and (records is not None or len(studies) > 1):
        raise FieldError(
            "--output", "", "must name a folder for a report on records or several studies", "add --output"
        )
    tables: list[StudyTable] = []
    for path in studies:
        if records is not None:
            tables.append(_read_records(path, records))
            continue
        tables.append(read_table(_find_table(path)))
    folder = output or _find_table(path).parent / "report"
    click.echo(f"» {write_study_report(merge_tables(tables), folder, num_draws=bootstraps)}")


@click.command(short_help="Show what happens inside the models, side by side.")
@study_file
@json_option
def probes(study: Path, *, as_json: bool) -> None:
    """Print what the runs measured inside their models, side by side, from the collected table.

    STUDY is the study file, or the table that `study collect` wrote.
    """
    from sas_megatron.cli.mechanism_tables import measured_slices, mechanism_record, print_mechanisms
    from sas_megatron.scaling.study.study_table import read_table

    slices = measured_slices(read_table(_find_table(study)))
    if as_json:
        click.echo(json.dumps(mechanism_record(slices), indent=2))
    else:
        print_mechanisms(slices)


def _find_table(study: Path) -> Path:
    """Return the path of a study's collected table, given the study file or the table."""
    return load_plan(study)().directory / TABLE if study.suffix in (".yaml", ".yml") else study


def _read_records(path: Path, folder: Path) -> StudyTable:
    """Return the table of a study's records."""
    from sas_megatron.scaling.study.record_exchange import collect_records

    return collect_records(*load_study_file(path), folder)


@click.command("export", short_help="Write compact records of the finished runs.")
@study_file
@_records
def export_runs(study: Path, *, records: Path) -> None:
    """Write a record of at most 20 kB of each finished run to a folder of STUDY in RECORDS.

    A record contains the config, the summary, the provenance and the metrics of a run, the latter with fewer
    points. `study import` reads it, also on another machine.
    """
    from sas_megatron.scaling.study.record_exchange import export_records

    _print_exchange(export_records(load_plan(study)(), records), "exported")


@click.command("import", short_help="Count the runs of records as finished.")
@study_file
@_records
def import_runs(study: Path, *, records: Path) -> None:
    """Import the records of STUDY in RECORDS, so that their runs count as finished.

    Records that are damaged, or of runs that STUDY does not plan, are refused, and nothing is imported.
    """
    from sas_megatron.scaling.study.record_exchange import import_records

    _print_exchange(import_records(load_plan(study), records), "imported")


def _print_exchange(exchange: Exchange, verb: str) -> None:
    for remark in exchange.remarks:
        click.echo(f"· {remark}")
    known = f", {len(exchange.known)} were there already" if exchange.known else ""
    click.echo(f"» {len(exchange.new)} runs {verb}{known}: {exchange.folder}")
