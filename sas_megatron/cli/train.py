"""`sas-megatron train`: one run, alone or as one rank of many."""

from __future__ import annotations

import logging

import click


@click.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Print the resolved config and its costs; start nothing.")
def train(config: str, overrides: tuple[str, ...], dry_run: bool) -> None:
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
    logging.basicConfig(format="%(message)s")
    from sas_megatron.training.start import train as run_training

    run_training(run_config)
