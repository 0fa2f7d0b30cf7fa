"""`sas-megatron train`: train one run, in one process or as one rank of several."""

from __future__ import annotations

import os
import sys

import click

from sas_megatron.cli.log_setup import configure_logging

# In the place of paths that the config may lack.
MOCK_PATHS = ("data.prefixes=[mock]", "data.tokenizer=mock", "data.weights=null")


@click.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Print the resolved config and its costs; start nothing.")
@click.option(
    "--check",
    "check_only",
    is_flag=True,
    help="Check config, data, WORLD_SIZE and MASTER_ADDR, and print the run directory; start nothing.",
)
@click.option("--mock-data", is_flag=True, help="Train on random tokens; no corpus and tokenizer are needed.")
def train(config: str, overrides: tuple[str, ...], dry_run: bool, check_only: bool, mock_data: bool) -> None:
    """Train the model that CONFIG describes. OVERRIDES have the form section.field=value.

    The command runs as a single process, or under torchrun, deepspeed or srun (see launch/). On SIGTERM,
    SIGINT, SIGUSR1 or SIGHUP, or after training.stop_after_seconds, it saves a checkpoint at the end of the
    step and exits with status 75. checkpoint.resume=auto resumes the run.
    """
    from sas_megatron.config.loading import dump_yaml, load_run_config
    from sas_megatron.platform.launcher import (
        check_rendezvous_address,
        launched_world_size,
        set_rank_from_slurm,
    )

    if not dry_run and not check_only:
        set_rank_from_slurm()
    run_config = load_run_config(config, [*overrides, *(MOCK_PATHS if mock_data else ())])
    if mock_data:
        from sas_megatron.data.mock_data import provide_mock_data

        data = provide_mock_data(run_config.data, vocab_size=run_config.model.vocab_size)
        run_config = run_config.model_copy(update={"data": data})
    if dry_run:
        from sas_megatron.cli.costs import print_costs

        click.echo(dump_yaml(run_config))
        print_costs({config: run_config}, with_terms=True)
        return
    from sas_megatron.training import entry

    if check_only:
        entry.check_run(run_config, world_size=launched_world_size())
        check_rendezvous_address()
        click.echo(os.path.abspath(run_config.logging.run_directory))
        return
    from sas_megatron.planning.hardware_file import find_peak_flops

    configure_logging()
    sys.exit(entry.train(run_config, find_peak_flops=find_peak_flops).exit_status)
