"""`sas-megatron match`: attention variants that cost what a base costs, as ready configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig
    from sas_megatron.scaling.matching import Degrees, Match

AXES = ("params", "flops", "kv", "time")


@click.command()
@click.argument("base", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option(
    "--variants",
    required=True,
    help="Attention kinds, and YAML files with a section attention, separated by commas.",
)
@click.option(
    "--equal",
    "axis",
    type=click.Choice(AXES),
    required=True,
    help="params; flops: in training, of a token; kv: cache of a token; time: of a step, measured here.",
)
@click.option("--free", help="Fields to solve for, separated by commas; by default the variant's own choice.")
@click.option("--tensor", default="", help="Tensor-parallel sizes that heads and widths must allow: 1,2,4.")
@click.option("--context", default="", help="Context-parallel sizes that heads must allow.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=0.01,
    show_default=True,
    help="As a share of the base's.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Of measuring, for --equal time.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the configs; by default none.")
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
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
    """Solve variants' free dimensions until each costs what BASE does on one axis.

    OVERRIDES (section.field=value) apply to the base, and so to all.
    """
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.scaling.matching import Degrees
    from sas_megatron.scaling.variants import build_variant

    base_config = load_run_config(base, list(overrides))
    parallel = base_config.parallel
    degrees = Degrees(
        _numbers("--tensor", tensor) or (parallel.tensor,),
        _numbers("--context", context) or (parallel.context,),
    )
    fields = tuple(free.split(",")) if free else None
    solve = _solver(axis, free=fields, degrees=degrees, tolerance=tolerance, rounds=rounds)
    matches: dict[str, Match] = {}
    for wanted in variants.split(","):
        name, variant = build_variant(base_config, wanted.strip())
        matches[name] = solve(base_config, variant)
    if output is not None:
        _write(matches, output, base=base, axis=axis)
    if as_json:
        click.echo(json.dumps({name: _as_dict(found) for name, found in matches.items()}, indent=2))
    else:
        _show(base_config, matches, axis=axis)


def _solver(
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
        announce=lambda text: click.echo(text, err=True),
        free=free,
        degrees=degrees,
        tolerance=tolerance,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from sas_megatron.config.errors import FieldError

    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise FieldError(option, text, "must be positive whole numbers", "write 1,2,4")
    return numbers


def _write(matches: dict[str, Match], output: Path, *, base: str, axis: str) -> None:
    from sas_megatron.config.errors import translate_os_errors
    from sas_megatron.config.loading import dump_tree
    from sas_megatron.io.files import make_folder, write_files

    texts: dict[Path, str] = {}
    for name, found in matches.items():
        ratios = ", ".join(f"{cost} {ratio:.4f}" for cost, ratio in found.ratios.items())
        sections = found.config.model_dump(mode="json", exclude_unset=True)
        tree = {section: fields for section, fields in sections.items() if fields}
        heading = (
            f"# Matched to {Path(base).name} in {axis} by `sas-megatron match`. Cost ratios: {ratios}.\n"
        )
        texts[output / f"{name}.yaml"] = heading + dump_tree(tree)
    with translate_os_errors(output, problem="cannot be written", remedy="name another --output"):
        make_folder(output)
        write_files(texts)


def _as_dict(found: Match) -> dict[str, Any]:
    return {
        "ratios": found.ratios,
        "changes": found.changes,
        "config": found.config.model_dump(mode="json", exclude_unset=True),
    }


def _show(base: RunConfig, matches: dict[str, Match], *, axis: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from sas_megatron.scaling.matching import counted_costs

    console = Console()
    table = Table(title=f"equal {axis}, as shares of the base's cost", title_justify="left")
    table.add_column("variant")
    axes = list(next(iter(matches.values())).ratios)
    for cost in axes:
        table.add_column(cost, justify="right")
    table.add_column("solved")
    for name, found in matches.items():
        solved = "\n".join(
            f"{field} {before:,} → {after:,}" for field, (before, after) in found.changes.items()
        )
        table.add_row(name, *(f"{found.ratios[cost]:.4f}" for cost in axes), solved or "as it was")
    console.print(table)
    costs = counted_costs(base)
    console.print(
        f"The base: {costs['params']:,} parameters, {costs['flops']:,} training FLOPs and {costs['kv']:,} "
        f"bytes of cache a token, at {base.data.sequence_length:,} tokens.",
        soft_wrap=True,
    )
