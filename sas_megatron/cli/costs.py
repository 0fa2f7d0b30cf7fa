"""`sas-megatron costs`: parameters and FLOPs of configs, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the tables.")
def costs(configs: tuple[str, ...], as_json: bool) -> None:
    """Count parameters and FLOPs per token of CONFIGS, by term."""
    from sas_megatron.config.loading import load_run_config

    by_name = {name: load_run_config(name) for name in configs}
    if as_json:
        click.echo(json.dumps({name: _count(config) for name, config in by_name.items()}, indent=2))
    else:
        print_costs(by_name)


def print_costs(configs: dict[str, RunConfig]) -> None:
    """Two tables, parameters and forward FLOPs per token, a column for each config."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    counted = {name: _count(config) for name, config in configs.items()}
    for quantity in ("parameters", "forward_flops_per_token"):
        table = Table(title=quantity.replace("_", " "), title_justify="left")
        table.add_column("term")
        for name in counted:
            table.add_column(name, justify="right")
        terms = dict.fromkeys(term for counts in counted.values() for term in counts[quantity])
        for term in terms:
            table.add_row(term, *(f"{counts[quantity].get(term, 0):,}" for counts in counted.values()))
        totals = [sum(counts[quantity].values()) for counts in counted.values()]
        table.add_section()
        table.add_row("total", *(f"{total:,}" for total in totals))
        table.add_row("ratio", *(f"{total / totals[0]:.3f}" for total in totals))
        console.print(table)
    console.print(
        "A multiply-add is two FLOPs; S² scores; the embedding look-up is free, the output layer counts."
    )


def _count(config: RunConfig) -> dict[str, dict[str, int]]:
    from sas_megatron.model.costs import count_forward_flops, count_parameters

    return {"parameters": count_parameters(config), "forward_flops_per_token": count_forward_flops(config)}
