"""`sas-megatron train`: one run, alone or as one rank of many."""

from __future__ import annotations

import os
import sys

import click

from sas_megatron.cli.log_setup import configure_logging


@click.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Print the resolved config and its costs; start nothing.")
@click.option(
    "--check",
    "only_check",
    is_flag=True,
    help="Check config, data, WORLD_SIZE and MASTER_ADDR, and print the run directory; start nothing.",
)
def train(config: str, overrides: tuple[str, ...], dry_run: bool, only_check: bool) -> None:
    """Train the model that CONFIG describes; OVERRIDES read section.field=value.

    The same command runs bare, as one process, and under torchrun, deepspeed and srun (launch/).
    On SIGTERM, SIGINT or SIGUSR1, or after training.stop_after_seconds, it saves at the end of the step
    and exits with status 75, to be gone on with by checkpoint.resume=true.
    """
    from sas_megatron.config.loading import dump_yaml, load_run_config
    from sas_megatron.platform.launcher import check_meeting_place, launched_world_size, take_place

    if not dry_run and not only_check:
        take_place()
    run_config = load_run_config(config, list(overrides))
    if dry_run:
        from sas_megatron.cli.costs import print_costs

        click.echo(dump_yaml(run_config))
        print_costs({config: run_config}, with_terms=True)
        return
    from sas_megatron.training import start

    if only_check:
        start.check(run_config, world_size=launched_world_size())
        check_meeting_place()
        click.echo(os.path.abspath(run_config.logging.run_directory))
        return
    configure_logging()
    sys.exit(start.train(run_config).exit_status)
