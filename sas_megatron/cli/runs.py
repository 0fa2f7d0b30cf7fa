"""`sas-megatron runs`: send the records of runs to W&B or MLflow."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def runs() -> None:
    """Send the records of runs to trackers."""


@runs.command(short_help="Send finished runs to their trackers.")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tracker",
    "trackers",
    multiple=True,
    type=click.Choice(["wandb", "mlflow"]),
    help="Tracker to send to; by default, logging.trackers of the run's config.",
)
def sync(directories: tuple[Path, ...], trackers: tuple[str, ...]) -> None:
    """Send the steps of run DIRECTORIES that their trackers have not received yet.

    The servers are named by the trackers' own variables, such as WANDB_API_KEY and MLFLOW_TRACKING_URI. The
    exit status is 1 if a tracker could not be reached.
    """
    from sas_megatron.config.errors import UserError
    from sas_megatron.tracking.sync import sync_run
    from sas_megatron.tracking.tracker import REMOTE_TRACKERS, check_installed, load_tracked_run

    is_complete = True
    for directory in directories:
        configured = load_tracked_run(directory).config.logging.trackers
        names = trackers or tuple(name for name in configured if name in REMOTE_TRACKERS)
        if not names:
            raise UserError(
                f"{directory}: logging.trackers={configured} names no tracker to send to; give --tracker"
            )
        check_installed(names)
        for result in sync_run(directory, names):
            sent = f"sent {result.num_rows:,} steps, the last is {result.last_step:,}"
            if result.problem is not None:
                is_complete = False
                sent = f"the last step that was sent is {result.last_step:,}: {result.problem}"
            click.echo(f"{directory} {result.tracker}: {sent}")
    if not is_complete:
        raise click.exceptions.Exit(1)


@runs.command(hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
def follow(directory: Path) -> None:
    """Send the steps of a run while it trains, until standard input closes. A training run starts this."""
    from sas_megatron.tracking import follower

    follower.follow(directory)
