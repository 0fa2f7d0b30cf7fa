"""What `study plan` and `study status` print."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sas_megatron.scaling.numbers import (
    MISSING,
    format_count,
    format_duration,
    format_exact,
    format_loss,
    format_power,
)
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study.resolution import SeedNoise, smallest_effect
from sas_megatron.scaling.study.run_states import RunStatus, final_loss

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sas_megatron.scaling.study.plan import Plan, PlannedRun


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    noise = _seed_noise(plan)
    return {
        "runs": [_run_as_dict(plan, run) for run in plan.runs],
        "totals": _totals(plan),
        "seed_noise": None
        if noise is None
        else {"deviation": noise.deviation, "degrees_of_freedom": noise.degrees},
        "smallest_effects": _smallest_effects(plan, noise),
    }


def print_plan(plan: Plan) -> None:
    """Every run, the sums, and what the study can tell apart."""
    console = _console()
    costs = [
        (heading, cells)
        for heading, cells in (
            ("hours", [_format_hours(plan.hours(run)) for run in plan.runs]),
            ("price", [_format_price(plan.price(run)) for run in plan.runs]),
        )
        if any(cell != MISSING for cell in cells)
    ]
    table = _table("run", "steps", "params", "tokens", "FLOPs", "lr", *(heading for heading, _ in costs))
    for number, run in enumerate(plan.runs):
        # Of a branch only its own steps count: the trunk's stand in its own line.
        rate = format(run.config.optimizer.learning_rate, ".3g") if run.is_ready else "by sweep"
        table.add_row(
            run.name,
            format_exact(run.own_steps),
            format_count(run.cell.parameters),
            format_count(run.tokens) if run.role != "trunk" else MISSING,
            format_power(run.own_flops),
            rate,
            *(cells[number] for _, cells in costs),
        )
    _print_whole(console, table)
    totals = _totals(plan)
    hours = "hours unknown: state machine.teraflops"
    if totals["hours"] is not None:
        hours = f"{_format_hours(totals['hours'])} hours of one rank"
        teraflops = plan.study.machine.teraflops
        is_simulated = plan.layouts or teraflops is None
        hours += " by simulated steps" if is_simulated else f" at {teraflops:g} TFLOP/s"
    priced = "" if totals["price"] is None else f", price {totals['price']:,.2f}"
    console.print(
        f"{totals['runs']} runs, {totals['results']} of them results: {format_power(totals['flops'])} "
        f"training FLOPs, attention in full ({format_power(totals['flops_without_trunks'])} if no steps were "
        f"shared), "
        f"{hours}{priced}.",
        soft_wrap=True,
    )
    _print_resolution(plan, console)


def _print_resolution(plan: Plan, console: Console) -> None:
    noise = _seed_noise(plan)
    if noise is None:
        console.print(
            "What it can tell apart is unknown: two seeds of something must have run, or state seed_noise.",
            soft_wrap=True,
        )
        return
    source = "stated" if noise.degrees is None else f"measured, {noise.degrees} degrees of freedom"
    console.print(f"Seed noise {noise.deviation:.4f} ({source}). Smallest loss difference it can tell:")
    table = _table("variant", "in one cell", "as mean of all")
    for name, (one, mean) in _smallest_effects(plan, noise).items():
        table.add_row(name, format_loss(one), format_loss(mean))
    console.print(table)


def _smallest_effects(plan: Plan, noise: SeedNoise | None) -> dict[str, tuple[float, float]]:
    """By variant, against the baseline: at one size and budget, and averaged over all of them.

    Of the budgets of one seed, which share a trunk, the mean is taken to vary as much as each.
    """
    if noise is None:
        return {}
    study = plan.study
    effects = {}
    for variant in list(study.variants)[1:]:
        seeds = study.num_seeds(study.baseline), study.num_seeds(variant)
        effects[variant] = (
            smallest_effect(noise, seeds=seeds),
            smallest_effect(noise, seeds=seeds, cells=len(study.sizes)),
        )
    return effects


def _seed_noise(plan: Plan) -> SeedNoise | None:
    if plan.study.seed_noise is not None:
        return SeedNoise(plan.study.seed_noise, degrees=None)
    from sas_megatron.scaling.seed_noise import pool_deviation

    cells: dict[tuple[str, float], list[float]] = {}
    for run in plan.results:
        loss = final_loss(run)
        if loss is not None and has_finished(run.directory):
            cells.setdefault((run.cell.name, run.budget), []).append(loss)
    pooled = pool_deviation(cells.values())
    return None if pooled is None else SeedNoise(*pooled)


def _run_as_dict(plan: Plan, run: PlannedRun) -> dict[str, Any]:
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
        "own_steps": run.own_steps,
        "parameters": run.cell.parameters,
        "tokens": run.tokens,
        "own_flops": run.own_flops,
        "learning_rate": run.config.optimizer.learning_rate if run.is_ready else None,
        "hours": plan.hours(run),
        "price": plan.price(run),
    }


def _totals(plan: Plan) -> dict[str, Any]:
    hours = [plan.hours(run) for run in plan.runs]
    prices = [plan.price(run) for run in plan.runs]
    return {
        "runs": len(plan.runs),
        "results": len(plan.results),
        "flops": sum(run.own_flops for run in plan.runs),
        "flops_without_trunks": sum(run.tokens * run.cell.flops_per_token for run in plan.results),
        "hours": None if None in hours else sum(filter(None, hours)),
        "price": None if None in prices else sum(filter(None, prices)),
    }


def status_as_dict(statuses: Sequence[RunStatus]) -> dict[str, Any]:
    """Where the runs stand, for programs."""
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
        "seconds_left": seconds_left(statuses),
    }


def print_status(statuses: Sequence[RunStatus]) -> None:
    """A line for each run that is not done, one for those in a row that wait alike, and the sums."""
    console = _console()
    table = _table("run", "state", "step", "why", right=("step",))
    for _, group in itertools.groupby(statuses, key=_alike):
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
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    left = seconds_left(statuses)
    time = "" if not left else f"; about {format_duration(left)} of computing left"
    console.print(f"{len(statuses)} runs: {told}{time}", soft_wrap=True)


def seconds_left(statuses: Sequence[RunStatus]) -> float | None:
    """Of computing, one run after another, by the pace of runs so far: of FLOPs of the same variant, or all.

    None before any run has a pace.
    """
    paces: dict[str, list[float]] = {}
    for status in statuses:
        if status.step_seconds is not None:
            cell = status.run.cell
            paces.setdefault(cell.variant, []).append(
                status.step_seconds / (cell.step_tokens * cell.flops_per_token)
            )
    everyone = [pace for own in paces.values() for pace in own]
    if not everyone:
        return None
    total = 0.0
    for status in statuses:
        cell = status.run.cell
        own = paces.get(cell.variant, everyone)
        flops = status.remaining_steps * cell.step_tokens * cell.flops_per_token
        total += flops * sum(own) / len(own)
    return total


def _alike(status: RunStatus) -> tuple[str, ...]:
    """What lets runs after one another share a line: that all have yet to begin, for one reason."""
    if status.state in ("ready", "waiting"):
        return status.state, status.reason or ""
    return (status.run.name,)


def _console() -> Console:
    from rich.console import Console

    # What runs print ([rank0]: …) is no markup.
    return Console(markup=False, highlight=False)


def _print_whole(console: Console, table: Table) -> None:
    """Every number in one piece, on a narrow terminal too, which wraps the lines by itself."""
    from rich.measure import measure_renderables

    needed = measure_renderables(console, console.options.update(max_width=1000), [table]).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _format_price(price: float | None) -> str:
    return MISSING if price is None else f"{price:,.2f}"


def _format_hours(hours: float | None) -> str:
    return MISSING if hours is None else f"{hours:,.3g}"


def _table(*columns: str, right: Sequence[str] | None = None) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        is_right = column in right if right is not None else number > 0
        # Names stay whole, to be copied.
        table.add_column(
            column, justify="right" if is_right else "left", overflow="fold", no_wrap=number == 0
        )
    return table
