"""`sas-megatron costs`: parameters, FLOPs and bytes of configs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig
    from sas_megatron.costs.attention_backend import Device

# By quantity: its terms, and its totals by convention.
Counted = dict[str, dict[str, dict[str, int]]]


@click.command()
@click.argument("configs", nargs=-1, required=True)
@click.option("--world-size", type=int, help="Ranks, for what they send; by default those of one model.")
@click.option(
    "--device",
    type=click.Choice(["gpu", "cpu"]),
    default="gpu",
    show_default=True,
    help="Which decides the attention's back end, and so what is kept and computed again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the tables.")
def costs(
    configs: tuple[str, ...],
    world_size: int | None,
    device: Device,
    as_json: bool,
) -> None:
    """Count what CONFIGS cost, by term: parameters, FLOPs, cache and activations, bytes on the wire.

    What reads section.field=value among them holds for all, as in data.sequence_length=4096.
    """
    from sas_megatron.config.errors import FieldError, UserError
    from sas_megatron.config.loading import load_run_config

    if world_size is not None and world_size < 1:
        raise FieldError("--world-size", world_size, "must be positive", "use 1 or more")
    names = [name for name in configs if "=" not in name or Path(name).exists()]
    overrides = [name for name in configs if name not in names]
    if not names:
        raise UserError(f"{configs[0]}: is an override, of no config; name a config before it")
    by_name = {name: load_run_config(name, overrides) for name in names}
    if as_json:
        counted = {
            name: count_costs(config, world_size=world_size, device=device)
            for name, config in by_name.items()
        }
        click.echo(json.dumps(counted, indent=2))
    else:
        print_costs(by_name, world_size=world_size, device=device)


def print_costs(
    configs: dict[str, RunConfig], *, world_size: int | None = None, device: Device = "gpu"
) -> None:
    """A table for each quantity: a row a term, a column a config, totals by each convention."""
    from rich.console import Console

    console = Console()
    counted = {
        name: count_costs(config, world_size=world_size, device=device) for name, config in configs.items()
    }
    for quantity in dict.fromkeys(quantity for counts in counted.values() for quantity in counts):
        columns = {name: counts[quantity] for name, counts in counted.items() if quantity in counts}
        console.print(_table(quantity.replace("_", " "), columns))
    lengths = sorted({config.data.sequence_length for config in configs.values()})
    console.print(
        f"At {' and '.join(f'{length:,}' for length in lengths)} tokens. A multiply-add is two FLOPs, "
        "training takes three times the forward pass; the embedding look-up is free, the output "
        "layer counts; the cache is of 2-byte elements; activations are what a rank of the first stage "
        f"keeps at most, on a {device.upper()}; bytes on the wire are what it sends, by ring.",
        soft_wrap=True,
    )


def _table(title: str, columns: dict[str, dict[str, dict[str, int]]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("term")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for term in dict.fromkeys(term for column in columns.values() for term in column["terms"]):
        table.add_row(term, *(f"{column['terms'].get(term, 0):,}" for column in columns.values()))
    for total in next(iter(columns.values()))["totals"]:
        amounts = [column["totals"][total] for column in columns.values()]
        table.add_section()
        table.add_row(total, *(f"{amount:,}" for amount in amounts))
        if amounts[0]:
            table.add_row("ratio", *(f"{amount / amounts[0]:.3f}" for amount in amounts))
    return table


def count_costs(config: RunConfig, *, world_size: int | None = None, device: Device = "gpu") -> Counted:
    """All quantities of one run; bytes on the wire as far as its engine's are counted.

    Args:
        config: The run.
        world_size: Its ranks; None: those of one model.
        device: What it runs on.

    Raises:
        FieldError: layout and world size do not fit.
    """
    from sas_megatron.costs.activations import count_kv_cache_bytes, count_peak_activation_bytes
    from sas_megatron.costs.communication import count_communication_bytes
    from sas_megatron.costs.flops import (
        causal_half,
        count_forward_flops,
        count_padding_flops,
        count_recompute_flops,
        count_training_flops,
    )
    from sas_megatron.costs.parameters import count_parameters, without_embeddings

    world_size = world_size or config.parallel.model_size
    data_parallel = config.check_world_size(world_size)
    parameters = count_parameters(config)
    flops = count_forward_flops(config)
    cache = count_kv_cache_bytes(config)
    causal = sum(causal_half(flops, sequence_length=config.data.sequence_length).values())
    training = count_training_flops(config)
    recomputed = sum(count_recompute_flops(config, device=device).values())
    padding = sum(count_padding_flops(config, device=device).values())
    kept = count_peak_activation_bytes(
        config, device=device, num_microbatches=config.training.num_microbatches(data_parallel)
    )
    counted = {
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
        "training_flops_per_token": {
            "terms": {**training, "recompute": recomputed, "padding": padding},
            "totals": {
                "of the model": sum(training.values()),
                "with what is recomputed and padded": sum(training.values()) + recomputed + padding,
            },
        },
        "kv_cache_bytes_per_token": {"terms": cache, "totals": {"total": sum(cache.values())}},
        "activation_bytes_of_a_rank": {"terms": kept, "totals": {"total": sum(kept.values())}},
    }
    if config.training.engine == "megatron":
        sent = count_communication_bytes(config, world_size=world_size)
        wire = {f"{group}: {term}": size for group, terms in sent.items() for term, size in terms.items()}
        counted["wire_bytes_per_step"] = {"terms": wire, "totals": {"total": sum(wire.values())}}
    return counted
