"""`sas-megatron costs`: parameters, FLOPs and bytes of configs, side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig
    from sas_megatron.costs.attention_backend import Device

# quantity -> {"terms": {term: amount}, "totals": {convention: amount}}
Counted = dict[str, dict[str, dict[str, int]]]

# The width of a terminal, and of a table's first column, in which long names are folded.
LINE_WIDTH, LABEL_WIDTH = 80, 24
PREFIXES = ("", " k", " M", " G", " T", " P", " E")
# The quantities of the compact table: key, total, heading, unit.
SUMMARY = (
    ("parameters", "total", "parameters", ""),
    ("training_flops_per_token", "of the model", "training FLOPs\nper token", ""),
    ("kv_cache_bytes_per_token", "total", "KV cache\nper token", "B"),
    ("activation_bytes_of_a_rank", "total", "activations\nper rank", "B"),
    ("communication_bytes_per_step", "total", "bytes sent\nper step", "B"),
)

# Headings and rows of tables whose text differs from the JSON key.
DISPLAY_NAMES = {
    "communication_bytes_per_step": "bytes sent per step",
    "with what is recomputed and padded": "with recompute and padding",
}


@click.command()
@click.argument("configs", nargs=-1, required=True)
@click.option("--terms", is_flag=True, help="Also print all terms of each quantity.")
@click.option("--world-size", type=int, help="Number of ranks, for communication; default: one model copy.")
@click.option(
    "--device",
    type=click.Choice(["gpu", "cpu"]),
    default="gpu",
    show_default=True,
    help="The device, which decides the implementation of attention.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def costs(
    configs: tuple[str, ...],
    terms: bool,
    world_size: int | None,
    device: Device,
    as_json: bool,
) -> None:
    """Count parameters, training FLOPs, KV cache, activations and communication of CONFIGS.

    Arguments of the form section.field=value override a field in all configs, as in
    data.sequence_length=4096.

    \f
    Raises:
        FieldError: The world size is not positive, or does not fit a layout.
        UserError: There is no config.
    """
    from sas_megatron.config.errors import FieldError, UserError
    from sas_megatron.config.loading import load_run_config

    if world_size is not None and world_size < 1:
        raise FieldError("--world-size", world_size, "must be positive", "use 1 or more")
    names = [name for name in configs if "=" not in name or os.path.exists(name)]
    overrides = [name for name in configs if name not in names]
    if not names:
        raise UserError(f"{configs[0]}: is an override without a config; name a config before it")
    by_name = {name: load_run_config(name, overrides) for name in names}
    if as_json:
        counted = {
            name: count_costs(config, world_size=world_size, device=device)
            for name, config in by_name.items()
        }
        click.echo(json.dumps(counted, indent=2))
    else:
        print_costs(by_name, world_size=world_size, device=device, with_terms=terms)


def print_costs(
    configs: dict[str, RunConfig],
    *,
    world_size: int | None = None,
    device: Device = "gpu",
    with_terms: bool = False,
) -> None:
    """Print a compact table of all configs, and on request a table of terms for each quantity.

    Args:
        configs: The configs by path.
        world_size: Number of ranks; None for one model copy.
        device: The device that the runs use.
        with_terms: Whether to print the tables of terms.

    Raises:
        FieldError: A layout does not fit the world size.
    """
    from rich.console import Console

    console = Console(width=LINE_WIDTH, highlight=False)
    counted = {
        name: count_costs(config, world_size=world_size, device=device)
        for name, config in zip(_short_names(list(configs)), configs.values(), strict=True)
    }
    console.print(_summary_table(counted))
    lengths = sorted({config.data.sequence_length for config in configs.values()})
    console.print(
        f"At {' and '.join(f'{length:,}' for length in lengths)} tokens. × is the ratio to the first config. "
        "A multiply-add is two FLOPs, and training is three times the forward pass; the embedding look-up is "
        "free, the output layer is counted. The KV cache has 2-byte elements. Activations are the peak of a "
        f"rank of the first pipeline stage on a {device.upper()}. Bytes sent are this rank's, by the "
        "ring convention." + ("" if with_terms else " All terms: --terms.")
    )
    if with_terms:
        for quantity in dict.fromkeys(quantity for counts in counted.values() for quantity in counts):
            columns = {name: counts[quantity] for name, counts in counted.items() if quantity in counts}
            for table in _term_tables(DISPLAY_NAMES.get(quantity, quantity.replace("_", " ")), columns):
                console.print(table)


def format_amount(amount: float, unit: str = "") -> str:
    """Return a number below 1,000, or four significant digits with an SI prefix, such as `134.1 M`."""
    prefix, scaled = 0, float(amount)
    while scaled >= (1000 if prefix == 0 else 999.95) and prefix < len(PREFIXES) - 1:
        prefix, scaled = prefix + 1, scaled / 1000
    digits = f"{amount:,}" if prefix == 0 else f"{scaled:#.4g}"
    return f"{digits}{PREFIXES[prefix] or (' ' if unit else '')}{unit}"


def _short_names(paths: list[str]) -> list[str]:
    """Return the end of each path, such as `125m/mha`, if these ends differ, otherwise the paths."""
    tails = []
    for path in map(Path, paths):
        folder = path.resolve().parent.name
        tails.append(path.stem if folder in ("", "configs") else f"{folder}/{path.stem}")
    return tails if len(set(tails)) == len(tails) else paths


def _summary_table(counted: dict[str, Counted]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("config", overflow="fold")
    for _, _, heading, _ in SUMMARY:
        table.add_column(heading, justify="right")
    first = next(iter(counted.values()))
    for name, counts in counted.items():
        cells = []
        for quantity, total, _, unit in SUMMARY:
            if quantity not in counts:
                cells.append("not counted")
                continue
            amount = counts[quantity]["totals"][total]
            base = first[quantity]["totals"][total] if quantity in first else 0
            ratio = "" if counts is first or not base else f"\n{amount / base:.2f}×"
            cells.append(format_amount(amount, unit) + ratio)
        table.add_row(name, *cells)
    return table


def _term_tables(title: str, columns: dict[str, dict[str, dict[str, int]]]) -> list[Any]:
    """Return tables with a row per term and a column per config, divided to fit in a line."""
    from rich import box
    from rich.table import Table

    names = list(columns)
    widest = max(
        len(text)
        for column in columns.values()
        for amounts in column.values()
        for text in map("{:,}".format, amounts.values())
    )
    per_table = max(1, (LINE_WIDTH - LABEL_WIDTH) // (max(widest, 8) + 1))
    first_totals = columns[names[0]]["totals"]
    terms = dict.fromkeys(term for column in columns.values() for term in column["terms"])
    tables = []
    for start in range(0, len(names), per_table):
        shown = names[start : start + per_table]
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False
        )
        table.add_column("term", overflow="fold", max_width=LABEL_WIDTH)
        for name in shown:
            table.add_column(name, justify="right", overflow="fold", min_width=widest)
        for term in terms:
            table.add_row(term, *(f"{columns[name]['terms'].get(term, 0):,}" for name in shown))
        for total, base in first_totals.items():
            table.add_section()
            amounts = [columns[name]["totals"][total] for name in shown]
            table.add_row(DISPLAY_NAMES.get(total, total), *(f"{amount:,}" for amount in amounts))
            if base:
                table.add_row("ratio", *(f"{amount / base:.2f}×" for amount in amounts))
        tables.append(table)
    return tables


def count_costs(config: RunConfig, *, world_size: int | None = None, device: Device = "gpu") -> Counted:
    """Count all quantities of one run; communication only for the engine `megatron`.

    Args:
        config: The run.
        world_size: Number of ranks; None for one model copy.
        device: The device that the run uses.

    Raises:
        FieldError: The layout does not fit the world size.
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
    causal = sum(causal_half(flops, sequence_length=config.data.sequence_length).values())
    training = count_training_flops(config)
    recomputed = sum(count_recompute_flops(config, device=device).values())
    padding = sum(count_padding_flops(config, device=device).values())
    activations = count_peak_activation_bytes(
        config, device=device, num_microbatches=config.training.num_microbatches(data_parallel)
    )
    model_total = sum(training.values())
    counted = {
        "parameters": _with_total(
            parameters, {"without embeddings": sum(without_embeddings(parameters).values())}
        ),
        "forward_flops_per_token": _with_total(
            flops,
            {
                "with the causal half of scores and values": round(causal),
                "without embeddings": sum(without_embeddings(flops).values()),
            },
        ),
        "training_flops_per_token": {
            "terms": {**training, "recompute": recomputed, "padding": padding},
            "totals": {
                "of the model": model_total,
                "with what is recomputed and padded": model_total + recomputed + padding,
            },
        },
        "kv_cache_bytes_per_token": _with_total(count_kv_cache_bytes(config)),
        "activation_bytes_of_a_rank": _with_total(activations),
    }
    if config.training.engine == "megatron":
        sent = count_communication_bytes(config, world_size=world_size)
        terms = {f"{group}: {term}": size for group, terms in sent.items() for term, size in terms.items()}
        counted["communication_bytes_per_step"] = _with_total(terms)
    return counted


def _with_total(
    terms: dict[str, int], other_totals: dict[str, int] | None = None
) -> dict[str, dict[str, int]]:
    """Return terms with their sum and other totals."""
    return {"terms": terms, "totals": {"total": sum(terms.values()), **(other_totals or {})}}
