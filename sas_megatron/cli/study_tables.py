"""Tables and JSON records of `study plan` and `study status`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sas_megatron.data.epochs import DataUse, format_epochs
from sas_megatron.scaling.analysis_of_variance import analyze_variance
from sas_megatron.scaling.numbers import (
    MISSING,
    format_count,
    format_duration,
    format_exact,
    format_loss,
    format_power,
)
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.seed_noise import SeedLosses
from sas_megatron.scaling.significance import smallest_detectable_difference
from sas_megatron.scaling.study.plan_data import count_data_uses, describe_repetitions
from sas_megatron.scaling.study.run_states import RunStatus, final_loss

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sas_megatron.scaling.study.plan import Plan, PlannedRun


@dataclass(frozen=True)
class _SeedNoise:
    """Deviations over seeds with their degrees of freedom (None if given), in one cell and of the mean."""

    cell: tuple[float, int | None]
    mean: tuple[float, int | None]


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    noise = _estimate_seed_noise(plan)
    uses = count_data_uses(plan)
    return {
        "runs": [_run_record(plan, run, uses.get(run.name)) for run in plan.runs],
        "warnings": describe_repetitions(uses),
        "totals": _sum_costs(plan),
        "seed_noise": None
        if noise is None
        else {"deviation": noise.cell[0], "degrees_of_freedom": noise.cell[1]},
        "smallest_effects": _list_detectable_differences(plan, noise),
    }


def print_plan(plan: Plan) -> None:
    """Print all runs, their total cost, repeated data, and the smallest differences that it can detect."""
    console = build_console()
    uses = count_data_uses(plan)
    columns = {
        # The steps of a trunk are counted once, in its own row.
        "steps": [format_exact(run.trained_steps) for run in plan.runs],
        "params": [format_count(run.cell.parameters) for run in plan.runs],
        "tokens": [format_count(run.tokens) if run.role != "trunk" else MISSING for run in plan.runs],
        "FLOPs": [format_power(run.trained_flops) for run in plan.runs],
        "epochs": [
            format_epochs(uses[run.name].epochs) if run.name in uses else MISSING for run in plan.runs
        ],
        "lr": [f"{run.config.optimizer.learning_rate:.3g}" if run.is_ready else "sweep" for run in plan.runs],
        "hours": [_format_hours(plan.hours(run)) for run in plan.runs],
        "price": [_format_price(plan.price(run)) for run in plan.runs],
    }
    known = {name: cells for name, cells in columns.items() if any(cell != MISSING for cell in cells)}
    _print_named_rows(console, [run.name for run in plan.runs], known)
    totals = _sum_costs(plan)
    hours = "hours unknown: set machine.teraflops"
    if totals["hours"] is not None:
        hours = f"{_format_hours(totals['hours'])} hours of one rank"
        teraflops = plan.study.machine.teraflops
        is_estimated = plan.layouts or teraflops is None
        hours += " by estimated step times" if is_estimated else f" at {teraflops:g} TFLOP/s"
    price = "" if totals["price"] is None else f", price {totals['price']:,.2f}"
    console.print(
        f"{totals['runs']} runs, of which {totals['results']} are compared: {format_power(totals['flops'])} "
        f"training FLOPs with full attention ({format_power(totals['flops_without_trunks'])} without shared "
        f"trunks), {hours}{price}.",
        soft_wrap=True,
    )
    for remark in describe_repetitions(uses):
        console.print(f"Warning: {remark}", soft_wrap=True)
    _print_detectable_differences(plan, console)


def _print_named_rows(console: Console, names: Sequence[str], columns: dict[str, list[str]]) -> None:
    """Print a row of numbers for each run; the name has a separate line if the table is too wide."""
    from rich.measure import measure_renderables

    def build(first: Sequence[str] | None) -> Table:
        table = build_table(*([] if first is None else ["run"]), *columns, right=list(columns), no_wrap=True)
        for number, cells in enumerate(zip(*columns.values(), strict=True)):
            table.add_row(*([] if first is None else [first[number]]), *cells)
        return table

    def width(table: Table) -> int:
        return measure_renderables(console, console.options.update(max_width=1000), [table]).maximum

    table = build(names)
    if width(table) <= console.width:
        console.print(table)
        return
    table = build(None)
    console.width = max(console.width, width(table))
    with console.capture() as capture:
        console.print(table)
    header, *rows = capture.get().splitlines()
    console.print(f"run\n  {header.rstrip()}", style="bold", soft_wrap=True)
    for name, row in zip(names, rows, strict=True):
        console.print(f"{name}\n  {row.rstrip()}", soft_wrap=True)


def _print_detectable_differences(plan: Plan, console: Console) -> None:
    noise = _estimate_seed_noise(plan)
    if noise is None:
        console.print(
            "Smallest detectable loss difference: unknown; train two seeds of a cell, or set seed_noise.",
            soft_wrap=True,
        )
        return
    deviation, degrees = noise.cell
    source = "given" if degrees is None else f"measured, {degrees} degrees of freedom"
    console.print(
        f"Seed noise {deviation:.4f} ({source}). Smallest detectable loss difference:", soft_wrap=True
    )
    table = build_table("variant", "in one cell", "mean of all", right=("in one cell", "mean of all"))
    for name, (one, mean) in _list_detectable_differences(plan, noise).items():
        table.add_row(name, format_loss(one), format_loss(mean))
    console.print(table)


def _list_detectable_differences(plan: Plan, noise: _SeedNoise | None) -> dict[str, tuple[float, float]]:
    """Return for each variant the detectable difference in one cell, and of the mean over all cells."""
    if noise is None:
        return {}
    study = plan.study
    differences = {}
    for variant in list(study.variants)[1:]:
        seeds = study.num_seeds(study.baseline), study.num_seeds(variant)
        one, mean = (smallest_detectable_difference(*each, seeds=seeds) for each in (noise.cell, noise.mean))
        differences[variant] = one, mean
    return differences


def _estimate_seed_noise(plan: Plan) -> _SeedNoise | None:
    """Return the noise in one cell, and that of the mean over cells; None if no cell has two seeds.

    A seed is shared by all cells, so that the mean is measured by seed. If that is not possible, it is
    assumed to vary as much as a single cell.
    """
    if plan.study.seed_noise is not None:
        return _SeedNoise((plan.study.seed_noise, None), (plan.study.seed_noise, None))
    losses: dict[str, dict[tuple[str, str], dict[int, float]]] = {}
    for run in plan.results:
        loss = final_loss(run)
        if loss is not None and has_finished(run.directory):
            variant = "-".join([run.cell.variant, *run.cell.levels.values()])
            cell = losses.setdefault(variant, {}).setdefault((run.cell.size, f"{run.budget:g}"), {})
            cell[run.seed] = loss
    cells = _pool(by_seed for by_cell in losses.values() for by_seed in by_cell.values())
    if cells is None:
        return None
    tables = [SeedLosses.of(by_cell) for by_cell in losses.values()]
    means = _pool(dict(zip(table.seeds, table.losses.mean(axis=0), strict=True)) for table in tables)
    return _SeedNoise(cells, means or cells)


def _pool(groups: Iterable[Mapping[int, float]]) -> tuple[float, int] | None:
    """Return the standard deviation within groups of seeds and its degrees of freedom."""
    sums = analyze_variance(list(groups))
    degrees = sums.seeds_degrees + sums.interaction_degrees
    return (math.sqrt((sums.seeds + sums.interaction) / degrees), degrees) if degrees else None


def _run_record(plan: Plan, run: PlannedRun, use: DataUse | None) -> dict[str, Any]:
    return {
        "name": run.name,
        "role": run.role,
        "variant": run.cell.variant,
        "size": run.cell.size,
        "levels": dict(run.cell.levels),
        "seed": run.seed,
        "budget": run.budget,
        "trunk": run.trunk,
        "steps": run.config.training.num_steps,
        "own_steps": run.trained_steps,
        "parameters": run.cell.parameters,
        "tokens": run.tokens,
        "epochs": None if use is None else use.epochs,
        "validation_epochs": None if use is None else use.validation_epochs,
        "own_flops": run.trained_flops,
        "learning_rate": run.config.optimizer.learning_rate if run.is_ready else None,
        "hours": plan.hours(run),
        "price": plan.price(run),
    }


def _sum_costs(plan: Plan) -> dict[str, Any]:
    hours = [plan.hours(run) for run in plan.runs]
    prices = [plan.price(run) for run in plan.runs]
    return {
        "runs": len(plan.runs),
        "results": len(plan.results),
        "flops": sum(run.trained_flops for run in plan.runs),
        "flops_without_trunks": sum(run.tokens * run.cell.flops_per_token for run in plan.results),
        "hours": None if None in hours else sum(filter(None, hours)),
        "price": None if None in prices else sum(filter(None, prices)),
    }


def status_record(statuses: Sequence[RunStatus]) -> dict[str, Any]:
    """Return the states of runs as JSON values."""
    return {
        "runs": [
            {
                "name": status.run.name,
                "state": status.state,
                "step": status.step,
                "steps": status.run.config.training.num_steps,
                "reason": status.reason,
            }
            for status in statuses
        ],
        "counts": dict(Counter(status.state for status in statuses)),
        "seconds_left": estimate_remaining_seconds(statuses),
    }


def print_status(statuses: Sequence[RunStatus]) -> None:
    """Print the runs that are not done, with consecutive runs that wait for the same reason in one row."""
    console = build_console()
    table = build_table("run", "state", "step", "reason", right=("step",))
    for _, group in itertools.groupby(statuses, key=_group_key):
        first, *others = group
        if first.state != "done":
            table.add_row(
                first.run.name + (f" and {len(others)} more" if others else ""),
                first.state,
                f"{first.step:,} / {first.run.config.training.num_steps:,}",
                first.reason or "",
            )
    if table.row_count:
        console.print(table)
    counts = Counter(status.state for status in statuses)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    remaining = estimate_remaining_seconds(statuses)
    time = "" if not remaining else f"; about {format_duration(remaining)} of training remaining"
    console.print(f"{len(statuses)} runs: {states}{time}", soft_wrap=True)


def estimate_remaining_seconds(statuses: Sequence[RunStatus]) -> float | None:
    """Estimate the remaining training time of all runs, one after another; None before any run has a speed.

    The seconds per FLOP are the mean over the runs of the same variant, or over all runs if it has none.
    """
    speeds: dict[str, list[float]] = {}
    for status in statuses:
        if status.step_seconds is not None:
            cell = status.run.cell
            speeds.setdefault(cell.variant, []).append(
                status.step_seconds / (cell.step_tokens * cell.flops_per_token)
            )
    all_speeds = [speed for of_variant in speeds.values() for speed in of_variant]
    if not all_speeds:
        return None
    total = 0.0
    for status in statuses:
        cell = status.run.cell
        of_variant = speeds.get(cell.variant, all_speeds)
        flops = status.remaining_steps * cell.step_tokens * cell.flops_per_token
        total += flops * sum(of_variant) / len(of_variant)
    return total


def _group_key(status: RunStatus) -> tuple[str, ...]:
    """Return a key that is equal for runs that have not started, for the same reason."""
    if status.state in ("ready", "waiting"):
        return status.state, status.reason or ""
    return (status.run.name,)


def build_console() -> Console:
    """Return a console that prints text without markup."""
    from rich.console import Console

    # The output of runs ([rank0]: …) is not markup.
    return Console(markup=False, highlight=False)


def _format_price(price: float | None) -> str:
    return MISSING if price is None else f"{price:,.2f}"


def _format_hours(hours: float | None) -> str:
    return MISSING if hours is None else f"{hours:,.3g}"


def build_table(*columns: str, right: Sequence[str], no_wrap: bool = False) -> Table:
    """Return a table without borders; `no_wrap` keeps every cell on one line, as names always are."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        justify: Any = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=no_wrap or number == 0)
    return table
