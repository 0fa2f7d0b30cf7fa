"""`sas-megatron study`: plan, run, collect and compare the runs that one file describes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from sas_megatron.cli.study_files import (
    json_option,
    load_plan,
    load_study_file,
    match_names,
    study_file,
    study_files,
)
from sas_megatron.cli.study_results import collect, export_runs, import_runs, probes, report
from sas_megatron.config.errors import FieldError

# Interval over which the load of other processes is measured before a measurement.
SECONDS_TO_LISTEN = 1.0

_only = click.option("--only", default="*", help="Restrict to runs whose names match, such as 'sas-*'.")


@click.group()
def study() -> None:
    """Plan, run and compare the runs that one file describes."""


@study.command()
@study_file
@json_option
def plan(study: Path, *, as_json: bool) -> None:
    """Print every run of STUDY and its cost, without starting anything."""
    from sas_megatron.cli.study_tables import plan_record, print_plan
    from sas_megatron.scaling.study.plan_data import check_data

    planned = load_plan(study)()
    check_data(planned)
    if as_json:
        click.echo(json.dumps(plan_record(planned), indent=2))
    else:
        print_plan(planned)


@study.command(short_help="Search for the fastest parallel layouts.")
@study_file
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

    loaded, base = load_study_file(study)
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
@study_file
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

    current_plan = load_plan(study)
    planned = current_plan()
    check_data(planned)
    # Runs with a SLURM job are not run here as well.
    queued = find_queued_runs(planned)
    runner = StudyRunner(current_plan, jobs=jobs, log=lambda text: click.echo(f"» {text}"), excluded=queued)
    if not runner.run(selected=match_names(only, planned)):
        raise click.exceptions.Exit(1)


@study.command(short_help="Measure the step time of every variant and size.")
@study_files
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Measurements per cell."
)
@click.option("--on-busy-machine", is_flag=True, help="Measure even if other processes use the processors.")
def time(studies: tuple[Path, ...], *, rounds: int, on_busy_machine: bool) -> None:
    """Measure the step time of every variant and size on this machine, for the time axis of reports.

    Each round measures every cell of all studies once, with random data, so that all seconds are comparable.
    A machine on which other processes use more than 0.2 processors is refused.
    """
    import time as clock

    from sas_megatron.benchmarks.step_time import measure_step_seconds
    from sas_megatron.platform.local_machine import OtherLoad, describe_processor
    from sas_megatron.scaling.study.step_times import check_quiet, describe_step_times, measure_step_times

    plans = [load_plan(path)() for path in studies]
    if not on_busy_machine:
        load = OtherLoad()
        clock.sleep(SECONDS_TO_LISTEN)
        check_quiet(load.measure())
    paths = measure_step_times(
        plans,
        lambda configs, count: measure_step_seconds(configs, rounds=count),
        rounds=rounds,
        machine=describe_processor(),
    )
    for planned, path in zip(plans, paths, strict=True):
        for remark in describe_step_times(planned)[1:]:
            click.echo(f"· {remark}")
        click.echo(f"» step times of {len(planned.cells)} cells, {rounds} rounds: {path}")


@study.command(context_settings={"ignore_unknown_options": True})
@study_file
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

    planned = load_plan(study)()
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
@study_file
@_only
@json_option
def status(study: Path, *, only: str, as_json: bool) -> None:
    """Show the state of each run, the reason of a failure, and the remaining time."""
    from sas_megatron.cli.study_tables import print_status, status_record
    from sas_megatron.scaling.study.run_states import read_status
    from sas_megatron.scaling.study.submission import find_queued_runs, read_jobs

    planned = load_plan(study)()
    if not planned.directory.exists():
        click.echo(
            f"» {planned.directory.absolute()}: does not exist; if the study has run, name its directory "
            "with --directory",
            err=True,
        )
    is_selected = match_names(only, planned)
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


for _command in (collect, report, probes, export_runs, import_runs):
    study.add_command(_command)
