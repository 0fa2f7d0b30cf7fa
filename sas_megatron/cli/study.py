"""`sas-megatron study`: many runs from one file, planned, run and collected."""

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

TABLE = "study.parquet"

_study_file = click.argument("study", type=click.Path(path_type=Path))
_as_json = click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
_only = click.option("--only", default="*", help="Only runs whose names match, such as 'sas-*'.")


@click.group()
def study() -> None:
    """Plan, run and compare many runs that one file describes."""


@study.command()
@_study_file
@_as_json
def plan(study: Path, *, as_json: bool) -> None:
    """Print every run that STUDY asks for, and what it will cost, before anything starts."""
    from sas_megatron.cli.study_tables import plan_as_dict, print_plan

    planned = _plan_of(study)()
    if as_json:
        click.echo(json.dumps(plan_as_dict(planned), indent=2))
    else:
        print_plan(planned)


@study.command()
@_study_file
@click.option("--hardware", required=True, help="h100, h200, a100, or a hardware file (see `estimate`).")
def layout(study: Path, *, hardware: str) -> None:
    """Search the fastest layout of every variant and size on machine.processes devices, by simulation.

    Plans take it from then on, and their hours from the simulated steps.
    """
    from sas_megatron.planning.hardware_file import load_hardware
    from sas_megatron.planning.layout_search import search_layouts
    from sas_megatron.platform.device import prepare_device
    from sas_megatron.scaling.study.layouts import CellLayout, layout_changes, write_layouts
    from sas_megatron.scaling.study.plan import build_plan
    from sas_megatron.scaling.study.study_file import load_study

    loaded, base = load_study(study)
    device, ranks = load_hardware(hardware), loaded.machine.processes
    # The devices are simulated on this processor.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare_device()
    found = {}
    for cell in build_plan(loaded, base).cells:
        search = search_layouts(cell.config, world_size=ranks, hardware=device)
        if not search.ranked:
            raise FieldError(
                "machine.processes", ranks, f"no layout of {cell.name} fits into {hardware}", "use more"
            )
        best = search.ranked[0]
        found[cell.name] = CellLayout(layout_changes(best.config), best.step.seconds)
        click.echo(f"» {cell.name}: {' '.join(search.overrides(best))}, {best.step.seconds:.4g} s a step")
    click.echo(f"» {write_layouts(loaded, found, hardware=device.name)}")


@study.command()
@_study_file
@_only
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs side by side.")
def run(study: Path, *, only: str, jobs: int) -> None:
    """Run on this machine what is not finished; killed and started again, it goes on.

    On Ctrl-C the runs at work save and stop. The exit status is 0 once all runs have finished.
    """
    from sas_megatron.scaling.study.runner import StudyRunner
    from sas_megatron.scaling.study.submission import live_runs

    plan_now = _plan_of(study)
    # What SLURM has is not run here as well.
    queued = live_runs(plan_now())
    runner = StudyRunner(plan_now, jobs=jobs, say=lambda text: click.echo(f"» {text}"), elsewhere=queued)
    if not runner.run(wanted=_matching(only, plan_now())):
        raise click.exceptions.Exit(1)


@study.command()
@_study_file
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of measuring.")
def time(study: Path, *, rounds: int) -> None:
    """Measure a step of every variant and size on this machine, in turn, for the study's time axis.

    Models are built and stepped, without data; a quiet machine gives better figures.
    """
    from sas_megatron.benchmarks.step_time import measure_step_seconds
    from sas_megatron.platform.local_machine import describe_processor
    from sas_megatron.scaling.study.step_times import measure_step_times

    planned = _plan_of(study)()
    path = measure_step_times(
        planned,
        lambda configs, count: measure_step_seconds(configs, rounds=count),
        rounds=rounds,
        machine=describe_processor(),
    )
    click.echo(f"» {len(planned.cells)} steps, {rounds} times each: {path}")


@study.command(context_settings={"ignore_unknown_options": True})
@_study_file
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--side-by-side", type=click.IntRange(min=1), help="Members of an array at work at once.")
def submit(study: Path, options: tuple[str, ...], *, side_by_side: int | None) -> None:
    """Submit what is not finished and has no job to SLURM, as job arrays; call it in the checkout.

    OPTIONS are sbatch's: --nodes=1 --gpus-per-node=8 --time=24:00:00, say. Branches wait for their trunks; a
    sweep's rates must be found before the runs that use them can be submitted.
    """
    from sas_megatron.scaling.study.submission import submit as submit_plan

    planned = _plan_of(study)()
    jobs = submit_plan(planned, options=options, side_by_side=side_by_side)
    for name, job in jobs.items():
        click.echo(f"» {name}: job {job.number}")
    waiting = sum(not run.is_ready for run in planned.runs)
    if waiting:
        click.echo(f"» {waiting} runs wait for the sweep; submit again when it has ended")
    if not jobs:
        click.echo("» nothing to submit")


@study.command()
@_study_file
@_only
@_as_json
def status(study: Path, *, only: str, as_json: bool) -> None:
    """Show how far each run has come: done, running, stuck, failed and why, and the time left."""
    from sas_megatron.cli.study_tables import print_status, status_as_dict
    from sas_megatron.scaling.study.run_states import status_of
    from sas_megatron.scaling.study.submission import live_runs, read_jobs

    planned = _plan_of(study)()
    wanted = _matching(only, planned)
    jobs, live = read_jobs(planned), live_runs(planned)
    statuses = [
        status_of(run, job_log=jobs[run.name].log if run.name in jobs else None, is_queued=run.name in live)
        for run in planned.runs
        if wanted(run)
    ]
    if as_json:
        click.echo(json.dumps(status_as_dict(statuses), indent=2))
    else:
        print_status(statuses)


@study.command()
@_study_file
@click.option(
    "--output", type=click.Path(path_type=Path), help=f"By default {TABLE} in the study's directory."
)
@_as_json
def collect(study: Path, *, output: Path | None, as_json: bool) -> None:
    """Gather the finished runs into one Parquet table; refuses runs that differ in more than STUDY varies."""
    from sas_megatron.scaling.study.collecting import collect as collect_table
    from sas_megatron.scaling.study.table import write_table

    planned = _plan_of(study)()
    table = collect_table(planned)
    path = output or Path(planned.study.directory) / TABLE
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


@study.command()
@_study_file
@click.option("--output", type=click.Path(path_type=Path), help="A folder; by default report in the study's.")
@click.option("--bootstraps", type=click.IntRange(min=50), default=1000, show_default=True, help="Draws.")
def report(study: Path, *, output: Path | None, bootstraps: int) -> None:
    """Fit, compare and write it up: a page, figures, a summary; from the collected table alone.

    STUDY is the study's file, or the table that `study collect` wrote.
    """
    from sas_megatron.scaling.study.report import write_study_report
    from sas_megatron.scaling.study.table import read_table

    path = study
    if study.suffix in (".yaml", ".yml"):
        path = Path(_plan_of(study)().study.directory) / TABLE
    table = read_table(path)
    page = write_study_report(table, output or path.parent / "report", num_draws=bootstraps)
    click.echo(f"» {page}")


def _plan_of(path: Path) -> Callable[[], Plan]:
    """The plan as it is at each call: the file is read once, sweeps may end meanwhile."""
    from sas_megatron.scaling.study.study_file import load_study
    from sas_megatron.scaling.study.sweeps import plan_with_rates

    loaded, base = load_study(path)
    return lambda: plan_with_rates(loaded, base)


def _matching(only: str, plan: Plan) -> Callable[[PlannedRun], bool]:
    """Which runs a pattern, or several separated by commas, asks for.

    Raises:
        FieldError: none of the plan's.
    """
    patterns = [only, *only.split(",")]

    def is_wanted(run: PlannedRun) -> bool:
        return any(fnmatch(run.name, pattern) for pattern in patterns)

    if not any(map(is_wanted, plan.runs)):
        raise FieldError(
            "--only",
            only,
            "is the name of no run",
            f"use one that `study plan` shows, such as {plan.runs[0].name}",
        )
    return is_wanted
