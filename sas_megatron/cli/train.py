"""`sas-megatron train`: one run, alone or as one rank of many."""

from __future__ import annotations

import logging

import click


@click.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Print the resolved config and its costs; start nothing.")
@click.option("--check", "only_check", is_flag=True, help="Check config, data and WORLD_SIZE; start nothing.")
def train(config: str, overrides: tuple[str, ...], dry_run: bool, only_check: bool) -> None:
    """Train the model that CONFIG describes; OVERRIDES read section.field=value.

    The same command runs bare (one process), under torchrun (launch/torchrun.sh) and under a
    cluster's launcher.
    """
    from sas_megatron.config.loading import dump_yaml, load_run_config

    run_config = load_run_config(config, list(overrides))
    if dry_run:
        from sas_megatron.cli.costs import print_costs

        click.echo(dump_yaml(run_config))
        print_costs({config: run_config})
        return
    from sas_megatron.platform.launcher import launched_world_size
    from sas_megatron.training import start

    if only_check:
        start.check(run_config, world_size=launched_world_size())
        return
    logging.basicConfig(format="%(message)s")
    start.train(run_config)
