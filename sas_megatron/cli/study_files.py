"""Arguments and loading of study files, shared by the commands of `sas-megatron study`."""

from __future__ import annotations

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

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON object instead of the table."
)


def _store_directory(context: click.Context, _parameter: click.Parameter, directory: Path | None) -> None:
    context.meta[_DIRECTORY] = directory


_directory_option = click.option(
    "--directory",
    type=click.Path(path_type=Path),
    callback=_store_directory,
    expose_value=False,
    help="Directory of the study, if STUDY names another path or one relative to another folder.",
)


def study_file(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument STUDY and the option --directory, which `load_study_file` reads."""
    return click.argument("study", type=click.Path(path_type=Path))(_directory_option(command))


def study_files(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument STUDY..., one or more study files, and the option --directory for a single one."""
    argument = click.argument(
        "studies", metavar="STUDY...", nargs=-1, required=True, type=click.Path(path_type=Path)
    )
    return argument(_directory_option(command))


def load_plan(path: Path) -> Callable[[], Plan]:
    """Load the study once and return a function for the current plan, which changes when a sweep finishes."""
    from sas_megatron.scaling.study.sweeps import plan_with_rates

    loaded, base = load_study_file(path)
    return lambda: plan_with_rates(loaded, base)


def load_study_file(path: Path) -> tuple[Study, dict[str, Any]]:
    """Load a study with the directory that --directory names; report one that was found elsewhere.

    Raises:
        FieldError: --directory is given with several study files.
        UserError: The study file cannot be read, or breaks a rule.
    """
    from sas_megatron.scaling.study.study_file import load_study, read_study

    context = click.get_current_context()
    directory: Path | None = context.meta[_DIRECTORY]
    if directory is not None and len(context.params.get("studies", ())) > 1:
        raise FieldError("--directory", directory, "is the directory of one study", "name one study file")
    loaded, base = load_study(path, directory=directory)
    if directory is None and Path(loaded.directory) != Path(read_study(path).directory):
        click.echo(f"» the directory of the study is {loaded.directory}", err=True)
    return loaded, base


def match_names(only: str, plan: Plan) -> Callable[[PlannedRun], bool]:
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
