"""`sas-megatron costs`: parameters and FLOPs of configs, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path())
@click.option("--sequence-length", type=int, help="In place of each config's own.")
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the tables.")
def costs(configs: tuple[str, ...], sequence_length: int | None, as_json: bool) -> None:
    """Count parameters, FLOPs and KV-cache bytes per token of CONFIGS, by term."""
    from sas_megatron.config.errors import FieldError
    from sas_megatron.config.loading import load_run_config

    if sequence_length is not None and sequence_length < 1:
        raise FieldError("--sequence-length", sequence_length, "must be positive", "use 1 or more")
    by_name = {name: load_run_config(name) for name in configs}
    if as_json:
        counted = {name: _count(config, sequence_length) for name, config in by_name.items()}
        click.echo(json.dumps(counted, indent=2))
    else:
        print_costs(by_name, sequence_length=sequence_length)


def print_costs(configs: dict[str, RunConfig], *, sequence_length: int | None = None) -> None:
    """A table for each quantity: a row a term, a column a config, totals by each convention."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    counted = {name: _count(config, sequence_length) for name, config in configs.items()}
    for quantity in next(iter(counted.values())):
        columns = [counts[quantity] for counts in counted.values()]
        table = Table(title=quantity.replace("_", " "), title_justify="left")
        table.add_column("term")
        for name in counted:
            table.add_column(name, justify="right", overflow="fold")
        for term in dict.fromkeys(term for column in columns for term in column["terms"]):
            table.add_row(term, *(f"{column['terms'].get(term, 0):,}" for column in columns))
        for total in columns[0]["totals"]:
            amounts = [column["totals"][total] for column in columns]
            table.add_section()
            table.add_row(total, *(f"{amount:,}" for amount in amounts))
            table.add_row("ratio", *(f"{amount / amounts[0]:.3f}" for amount in amounts))
        console.print(table)
    lengths = {sequence_length or config.data.sequence_length for config in configs.values()}
    console.print(
        f"At {' and '.join(f'{length:,}' for length in sorted(lengths))} tokens. A multiply-add is two "
        "FLOPs, training takes three times the forward pass; the embedding look-up is free, the output "
        "layer counts; the cache is of 2-byte elements.",
        soft_wrap=True,
    )


def _count(config: RunConfig, sequence_length: int | None) -> dict[str, dict[str, dict[str, int]]]:
    """By quantity: its terms, and its totals by convention."""
    from sas_megatron.model.costs import (
        causal_half,
        count_forward_flops,
        count_kv_cache_bytes,
        count_parameters,
        without_embeddings,
    )

    length = sequence_length or config.data.sequence_length
    parameters = count_parameters(config)
    flops = count_forward_flops(config, sequence_length=length)
    cache = count_kv_cache_bytes(config)
    causal = sum(causal_half(flops, sequence_length=length).values())
    return {
        "parameters": {
            "terms": parameters,
            "totals": {
                "total": sum(parameters.values()),
                "without embeddings": sum(without_embeddings(parameters).values()),
            },
        },
        "forward_flops_per_token": {
            "terms": flops,
            "totals": {
                "total": sum(flops.values()),
                "with the causal half of scores and values": round(causal),
                "without embeddings": sum(without_embeddings(flops).values()),
            },
        },
        "kv_cache_bytes_per_token": {"terms": cache, "totals": {"total": sum(cache.values())}},
    }
