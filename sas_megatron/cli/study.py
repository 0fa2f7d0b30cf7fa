"""`sas-megatron study`: plan, run, collect and compare the runs that one file describes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sas_megatron.config.errors import FieldError

if TYPE_CHECKING:
    from sas_megatron.scaling.study.plan import Plan, PlannedRun
    from sas_megatron.scaling.study.study_file import Study

TABLE = "study.parquet"

_DIRECTORY = "study directory"  # in the context of the command


def _study_file(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument STUDY and the option --directory, which `_load_study` reads."""

    def store(context: click.Context, _parameter: click.Parameter, directory: Path | None) -> None:
        context.meta[_DIRECTORY] = directory

    option = click.option(
        "--directory",
        type=click.Path(path_type=Path),
        callback=store,
        expose_value=False,
        help="Directory of the study, if STUDY names another path or one relative to another folder.",
    )
    return click.argument("study", type=click.Path(path_type=Path))(option(command))


_as_json = click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
_only = click.option("--only", default="*", help="Restrict to runs whose names match, such as 'sas-*'.")


@click.group()
def study() -> None:
    """Plan, run and compare the runs that one file describes."""


@study.command()
@_study_file
@_as_json
def plan(study: Path, *, as_json: bool) -> None:
    """Print every run of STUDY and its cost, without starting anything."""
    from sas_megatron.cli.study_tables import plan_record, print_plan
    from sas_megatron.scaling.study.plan_data import check_data

    planned = _load_plan(study)()
    check_data(planned)
    if as_json:
        click.echo(json.dumps(plan_record(planned), indent=2))
    else:
        print_plan(planned)


@study.command(short_help="Search for the fastest parallel layouts.")
@_study_file
@click.option("--hardware", required=True, help="h100, h200, a100, or a hardware file (see `estimate`).")
def layout(study: Path, *, hardware: str) -> None:
    """Search for the fastest parallel layout of every variant and size on machine.processes devices.

    The search uses estimated step times. Later plans use the layouts, and the estimated times for their
    hours.

    \f
    Raises:
        FieldError: No layout of a cell fits into the memory of the device.
    """
    from sas_megatron.planning.hardware_file import load_hardware
    from sas_megatron.planning.layout_search import search_layouts
    from sas_megatron.platform.device import prepare_device
    from sas_megatron.scaling.study.layouts import CellLayout, layout_changes, write_layouts
    from sas_megatron.scaling.study.plan_builder import build_plan

    loaded, base = _load_study(study)
    device, ranks = load_hardware(hardware), loaded.machine.processes
    # The estimate runs on the CPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare_device()
    found = {}
    for cell in build_plan(loaded, base).cells:
        search = search_layouts(cell.config, world_size=ranks, hardware=device)
        if not search.ranked:
            raise FieldError(
                "machine.processes",
                ranks,
                f"no layout of {cell.name} fits into the memory of {hardware}",
                "use more processes",
            )
        best = search.ranked[0]
        found[cell.name] = CellLayout(layout_changes(best.config), best.step.seconds)
        click.echo(f"» {cell.name}: {' '.join(search.overrides(best))}, {best.step.seconds:.4g} s per step")
    click.echo(f"» {write_layouts(loaded, found, hardware=device.name)}")


@study.command()
@_study_file
@_only
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs in parallel.")
def run(study: Path, *, only: str, jobs: int) -> None:
    """Run the unfinished runs on this machine. A command that is killed and started again resumes them.

    On Ctrl-C, the started runs save a checkpoint and stop. The exit status is 0 if all runs have finished.

    \f
    Raises:
        click.exceptions.Exit: A run has failed or was stopped; the exit status is 1.
    """
    from sas_megatron.scaling.study.plan_data import check_data
    from sas_megatron.scaling.study.runner import StudyRunner
    from sas_megatron.scaling.study.submission import find_queued_runs

    load_plan = _load_plan(study)
    planned = load_plan()
    check_data(planned)
    # Runs with a SLURM job are not run here as well.
    queued = find_queued_runs(planned)
    runner = StudyRunner(load_plan, jobs=jobs, log=lambda text: click.echo(f"» {text}"), excluded=queued)
    if not runner.run(selected=_match_names(only, planned)):
        raise click.exceptions.Exit(1)


@study.command(short_help="Measure the step time of every variant and size.")
@_study_file
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Measurements per cell."
)
def time(study: Path, *, rounds: int) -> None:
    """Measure the step time of every variant and size on this machine, for the study's time axis.

    Each round measures every cell once, with random data. Results are best on a machine without other load.
    """
    from sas_megatron.benchmarks.step_time import measure_step_seconds
    from sas_megatron.platform.local_machine import describe_processor
    from sas_megatron.scaling.study.step_times import measure_step_times

    planned = _load_plan(study)()
    path = measure_step_times(
        planned,
        lambda configs, count: measure_step_seconds(configs, rounds=count),
        rounds=rounds,
        machine=describe_processor(),
    )
    click.echo(f"» step times of {len(planned.cells)} cells, {rounds} rounds: {path}")


@study.command(context_settings={"ignore_unknown_options": True})
@_study_file
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--side-by-side", type=click.IntRange(min=1), help="Members of a job array that may run in parallel."
)
def submit(study: Path, options: tuple[str, ...], *, side_by_side: int | None) -> None:
    """Submit the unfinished runs without a job to SLURM, as job arrays. Call it in the checkout.

    OPTIONS are passed to sbatch, for example --nodes=1 --gpus-per-node=8 --time=24:00:00. Branches depend on
    their trunks. The runs after a sweep can be submitted once the sweep has finished.
    """
    from sas_megatron.scaling.study.plan_data import check_data
    from sas_megatron.scaling.study.submission import submit as submit_plan

    planned = _load_plan(study)()
    check_data(planned)
    jobs = submit_plan(planned, options=options, max_parallel=side_by_side)
    for name, job in jobs.items():
        click.echo(f"» {name}: job {job.number}")
    waiting = sum(not run.is_ready for run in planned.runs)
    if waiting:
        click.echo(f"» {waiting} runs depend on the sweep; submit again when it has finished")
    if not jobs:
        click.echo("» nothing to submit")


@study.command(short_help="Show the state of each run and the remaining time.")
@_study_file
@_only
@_as_json
def status(study: Path, *, only: str, as_json: bool) -> None:
    """Show the state of each run, the reason of a failure, and the remaining time."""
    from sas_megatron.cli.study_tables import print_status, status_record
    from sas_megatron.scaling.study.run_states import read_status
    from sas_megatron.scaling.study.submission import find_queued_runs, read_jobs

    planned = _load_plan(study)()
    if not planned.directory.exists():
        click.echo(
            f"» {planned.directory.absolute()}: does not exist; if the study has run, name its directory "
            "with --directory",
            err=True,
        )
    is_selected = _match_names(only, planned)
    jobs, queued = read_jobs(planned), find_queued_runs(planned)
    statuses = [
        read_status(
            run, job_log=jobs[run.name].log if run.name in jobs else None, is_queued=run.name in queued
        )
        for run in planned.runs
        if is_selected(run)
    ]
    if as_json:
        click.echo(json.dumps(status_record(statuses), indent=2))
    else:
        print_status(statuses)


@study.command()
@_study_file
@click.option("--output", type=click.Path(path_type=Path), help=f"Default: {TABLE} in the study's directory.")
@_as_json
def collect(study: Path, *, output: Path | None, as_json: bool) -> None:
    """Collect the finished runs into one Parquet table.

    It is an error if runs differ in fields that STUDY does not vary.
    """
    from sas_megatron.scaling.study.collecting import collect as collect_table
    from sas_megatron.scaling.study.study_table import write_table

    planned = _load_plan(study)()
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


@study.command(short_help="Fit laws, compare variants, and write a report.")
@_study_file
@click.option("--output", type=click.Path(path_type=Path), help="Folder. Default: report/ next to the table.")
@click.option(
    "--bootstraps", type=click.IntRange(min=50), default=1000, show_default=True, help="Bootstrap draws."
)
def report(study: Path, *, output: Path | None, bootstraps: int) -> None:
    """Fit laws, compare variants, and write a page, figures and a summary from the collected table.

    STUDY is the study file, or the table that `study collect` wrote.
    """
    from sas_megatron.scaling.study.study_report import write_study_report
    from sas_megatron.scaling.study.study_table import read_table

    path = _find_table(study)
    table = read_table(path)
    page = write_study_report(table, output or path.parent / "report", num_draws=bootstraps)
    click.echo(f"» {page}")


@study.command(short_help="Show what happens inside the models, side by side.")
@_study_file
@_as_json
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
    if study.suffix in (".yaml", ".yml"):
        return _load_plan(study)().directory / TABLE
    return study


def _load_plan(path: Path) -> Callable[[], Plan]:
    """Load the study once and return a function for the current plan, which changes when a sweep finishes."""
    from sas_megatron.scaling.study.sweeps import plan_with_rates

    loaded, base = _load_study(path)
    return lambda: plan_with_rates(loaded, base)


def _load_study(path: Path) -> tuple[Study, dict[str, Any]]:
    """Load a study with the directory that --directory names; report one that was found elsewhere."""
    from sas_megatron.scaling.study.study_file import load_study, read_study

    directory: Path | None = click.get_current_context().meta[_DIRECTORY]
    loaded, base = load_study(path, directory=directory)
    if directory is None and Path(loaded.directory) != Path(read_study(path).directory):
        click.echo(f"» the directory of the study is {loaded.directory}", err=True)
    return loaded, base


def _match_names(only: str, plan: Plan) -> Callable[[PlannedRun], bool]:
    """Return a predicate for the runs that match a pattern, or one of several separated by commas.

    Raises:
        FieldError: No run of the plan matches.
    """
    patterns = [only, *only.split(",")]

    def is_selected(run: PlannedRun) -> bool:
        return any(fnmatch(run.name, pattern) for pattern in patterns)

    if not any(map(is_selected, plan.runs)):
        raise FieldError(
            "--only",
            only,
            "matches no run",
            f"use a name that `study plan` shows, such as {plan.runs[0].name}",
        )
    return is_selected
