"""`sas-megatron match`: configs of attention variants whose cost equals that of a base config."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig
    from sas_megatron.scaling.matching import Degrees, Match

MATCHED_COSTS = ("params", "flops", "kv", "time")


@click.command()
@click.argument("base", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option(
    "--variants",
    required=True,
    help="Comma-separated attention kinds, or YAML files with a section attention.",
)
@click.option(
    "--equal",
    "axis",
    type=click.Choice(MATCHED_COSTS),
    required=True,
    help="params; flops: training FLOPs per token; kv: cache bytes per token; time: measured step time.",
)
@click.option("--free", help="Comma-separated fields to solve for. Default: chosen by the variant.")
@click.option(
    "--tensor", default="", help="Tensor-parallel sizes that heads and widths must support, such as 1,2,4."
)
@click.option("--context", default="", help="Context-parallel sizes that heads must support.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=0.01,
    show_default=True,
    help="Largest relative difference in cost.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Measurement rounds, for --equal time.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the configs. Default: they are not written."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
def match(
    base: str,
    overrides: tuple[str, ...],
    *,
    variants: str,
    axis: str,
    free: str | None,
    tensor: str,
    context: str,
    tolerance: float,
    rounds: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Solve for the free dimensions of variants at which each equals BASE in one cost.

    OVERRIDES (section.field=value) apply to the base and thus to all variants.
    """
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.scaling.matching import Degrees
    from sas_megatron.scaling.variants import build_variant

    base_config = load_run_config(base, list(overrides))
    parallel = base_config.parallel
    degrees = Degrees(
        _parse_sizes("--tensor", tensor) or (parallel.tensor,),
        _parse_sizes("--context", context) or (parallel.context,),
    )
    fields = tuple(free.split(",")) if free else None
    solve = _build_solver(axis, free=fields, degrees=degrees, tolerance=tolerance, rounds=rounds)
    matches: dict[str, Match] = {}
    for attention in variants.split(","):
        name, variant = build_variant(base_config, attention.strip())
        matches[name] = solve(base_config, variant)
    if output is not None:
        _write_configs(matches, output, base=base, axis=axis)
    if as_json:
        click.echo(json.dumps({name: _match_record(found) for name, found in matches.items()}, indent=2))
    else:
        _print_matches(base_config, matches, axis=axis)


def _build_solver(
    axis: str, *, free: tuple[str, ...] | None, degrees: Degrees, tolerance: float, rounds: int
) -> Callable[[RunConfig, RunConfig], Match]:
    from sas_megatron.scaling import matching

    if axis != "time":
        return lambda base, variant: matching.match(
            base, variant, axis=axis, free=free, degrees=degrees, tolerance=tolerance
        )
    from sas_megatron.benchmarks.step_time import measure_step_seconds
    from sas_megatron.scaling.time_matching import match_time

    return lambda base, variant: match_time(
        base,
        variant,
        measure=lambda configs: measure_step_seconds(configs, rounds=rounds),
        log=lambda text: click.echo(text, err=True),
        free=free,
        degrees=degrees,
        tolerance=tolerance,
    )


def _parse_sizes(option: str, text: str) -> tuple[int, ...]:
    from sas_megatron.config.errors import FieldError

    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise FieldError(option, text, "must be positive whole numbers", "write 1,2,4")
    return numbers


def _write_configs(matches: dict[str, Match], output: Path, *, base: str, axis: str) -> None:
    from sas_megatron.config.errors import translate_os_errors
    from sas_megatron.config.loading import BASE, dump_tree, find_base, read_run_tree
    from sas_megatron.io.files import make_folder, write_files

    # The configs keep the base of BASE, whose fields they do not repeat.
    shared_file = find_base(base)
    shared = {} if shared_file is None else read_run_tree(shared_file)
    texts: dict[Path, str] = {}
    for name, found in matches.items():
        ratios = ", ".join(f"{cost} {ratio:.4f}" for cost, ratio in found.ratios.items())
        sections = found.config.model_dump(mode="json", exclude_unset=True)
        tree: dict[str, Any] = {} if shared_file is None else {BASE: os.path.relpath(shared_file, output)}
        for section, fields in sections.items():
            kept = {
                name: fields[name] for name in fields if fields[name] != shared.get(section, {}).get(name)
            }
            tree |= {section: fields if section == "attention" else kept} if kept else {}
        heading = (
            f"# Matched to {Path(base).name} in {axis} by `sas-megatron match`. Cost ratios: {ratios}.\n"
        )
        texts[output / f"{name}.yaml"] = heading + dump_tree(tree)
    with translate_os_errors(output, problem="cannot be written", remedy="name another --output"):
        make_folder(output)
        write_files(texts)


def _match_record(found: Match) -> dict[str, Any]:
    return {
        "ratios": found.ratios,
        "changes": found.changes,
        "config": found.config.model_dump(mode="json", exclude_unset=True),
    }


def _print_matches(base: RunConfig, matches: dict[str, Match], *, axis: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from sas_megatron.scaling.matching import counted_costs

    console = Console()
    table = Table(title=f"Equal {axis}; costs relative to the base", title_justify="left")
    table.add_column("variant")
    axes = list(next(iter(matches.values())).ratios)
    for cost in axes:
        table.add_column(cost, justify="right")
    table.add_column("changed fields")
    for name, found in matches.items():
        solved = "\n".join(
            f"{field} {before:,} → {after:,}" for field, (before, after) in found.changes.items()
        )
        table.add_row(name, *(f"{found.ratios[cost]:.4f}" for cost in axes), solved or "none")
    console.print(table)
    costs = counted_costs(base)
    console.print(
        f"Base: {costs['params']:,} parameters, {costs['flops']:,} training FLOPs and {costs['kv']:,} bytes "
        f"of cache per token, at a sequence length of {base.data.sequence_length:,}.",
        soft_wrap=True,
    )
