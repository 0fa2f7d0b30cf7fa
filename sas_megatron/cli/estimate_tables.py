"""What `sas-megatron estimate` prints: estimates, validations and searches, as objects and as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sas_megatron.planning.layout_search import LayoutSearch
    from sas_megatron.planning.rank_estimate import RankReport
    from sas_megatron.planning.run_estimate import RunEstimate
    from sas_megatron.planning.step_estimate import StepEstimate
    from sas_megatron.planning.validation import Validation


def estimate_as_dict(estimate: RunEstimate) -> dict[str, Any]:
    """The whole estimate in plain types; bytes and FLOPs of one rank and one optimizer step."""
    hardware = estimate.hardware
    return {
        "world_size": estimate.world_size,
        "data_parallel": estimate.data_parallel,
        "hardware": hardware.name,
        "ranks": [_rank_as_dict(report) for report in estimate.reports],
        "needed_bytes_with_allocator_and_reserve": round(hardware.needed_bytes(estimate.peak_bytes)),
        "memory_bytes": round(hardware.memory_gib * 2**30),
        "fits": hardware.fits(estimate.peak_bytes),
        "step": _step_as_dict(estimate.step),
    }


def _rank_as_dict(report: RankReport) -> dict[str, Any]:
    return {
        "rank": report.rank,
        "layers": report.num_layers,
        "attended_heads": report.num_heads,
        "parameters": report.num_parameters,
        "parameter_bytes": report.parameter_bytes,
        "gradient_bytes": report.gradient_bytes,
        "optimizer_bytes": report.optimizer_bytes,
        "peak_activation_bytes": report.activation_bytes,
        "peak_bytes": report.peak_bytes,
        "microbatches": report.num_microbatches,
        "flops": round(report.step.flops),
        "communication_bytes_sent": report.step.rounded_bytes_sent(),
    }


def _step_as_dict(step: StepEstimate) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "seconds_by_term": step.terms_seconds,
        "pipeline_bubble": step.bubble,
        "tokens_per_second": step.tokens_per_second,
        "model_flops_utilization": step.model_flops_utilization,
    }


_RANK_ROWS = {
    "layers": "layers",
    "attended_heads": "attended heads",
    "parameters": "parameters",
    "parameter_bytes": "weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "peak_activation_bytes": "activations and temporaries, peak",
    "peak_bytes": "all together, peak",
    "microbatches": "microbatches a step",
    "flops": "FLOPs a step",
}


def show_estimate(result: dict[str, Any]) -> None:
    """Tables: what the ranks hold and do, what they send, and the seconds of a step."""
    console = Console()
    ranks = result["ranks"]
    table = _table("held and computed", [f"rank {rank['rank']}" for rank in ranks])
    for key, label in _RANK_ROWS.items():
        table.add_row(label, *(_quantity(key, rank[key]) for rank in ranks))
    console.print(table)
    sent = {
        (group, operation): None
        for rank in ranks
        for group, operations in rank["communication_bytes_sent"].items()
        for operation in operations
    }
    if sent:
        table = _table("bytes sent in a step", [f"rank {rank['rank']}" for rank in ranks])
        for group, operation in sent:
            counts = (rank["communication_bytes_sent"].get(group, {}).get(operation, 0) for rank in ranks)
            table.add_row(f"{group} {operation}", *(f"{count:,}" for count in counts))
        console.print(table)
    _show_step(console, result["step"])
    verdict = "fits" if result["fits"] else "does not fit"
    console.print(
        f"{result['world_size']} ranks, {result['data_parallel']} data-parallel, on {result['hardware']}: "
        f"needs {_gib(result['needed_bytes_with_allocator_and_reserve'])} of {_gib(result['memory_bytes'])}, "
        f"{verdict}.",
        soft_wrap=True,
    )
    console.print(
        "A multiply-add is two FLOPs, fused attention counts S² scores; bytes in the ring convention; "
        "communication overlaps only as parallel.overlap_* says; the shares of the peak are the "
        "hardware file's.",
        soft_wrap=True,
    )


def _show_step(console: Console, step: dict[str, Any]) -> None:
    table = _table("seconds of a step", ["seconds", "share"])
    for term, seconds in step["seconds_by_term"].items():
        table.add_row(term, f"{seconds:.4g}", f"{seconds / step['seconds']:.1%}")
    table.add_section()
    table.add_row("total", f"{step['seconds']:.4g}", "")
    table.add_row("tokens/s", f"{step['tokens_per_second']:,.0f}", "")
    table.add_row("pipeline bubble", f"{step['pipeline_bubble']:.1%}", "")
    table.add_row("model FLOPs utilization", f"{step['model_flops_utilization']:.1%}", "")
    console.print(table)


def validation_as_dict(validation: Validation) -> dict[str, Any]:
    """Estimated, measured and error, by rank, in plain types."""
    return {
        "hardware": validation.hardware.model_dump(mode="json"),
        "ranks": [
            {
                "rank": rank.rank,
                "communication_is_equal": rank.communication_is_equal,
                "communication_bytes_sent": {
                    "estimated": rank.estimated_bytes_sent,
                    "measured": rank.measured_bytes_sent,
                },
                "peak_bytes": {
                    "estimated": rank.estimated_peak_bytes,
                    "measured": rank.measured_peak_bytes,
                    "error": rank.memory_error,
                },
            }
            for rank in validation.ranks
        ],
        "step_seconds": {
            "estimated": validation.step.seconds,
            "estimated_by_term": validation.step.terms_seconds,
            "measured": validation.measured_step_seconds,
            "error": validation.time_error,
        },
    }


def show_validation(result: dict[str, Any]) -> None:
    """One table: wire by group, peak memory by rank, and the step's time."""
    table = _table("estimate against this machine", ["estimated", "measured", "error"])
    for rank in result["ranks"]:
        name, sent, peak = f"rank {rank['rank']}", rank["communication_bytes_sent"], rank["peak_bytes"]
        for group in dict.fromkeys([*sent["estimated"], *sent["measured"]]):
            estimated, measured = (
                sum(sent[side].get(group, {}).values()) for side in ("estimated", "measured")
            )
            error = "equal" if sent["estimated"].get(group) == sent["measured"].get(group) else "DIFFERS"
            table.add_row(f"{name}: bytes sent, {group}", f"{estimated:,}", f"{measured:,}", error)
        row = (f"{peak[side] / 2**20:,.1f} MiB" for side in ("estimated", "measured"))
        table.add_row(f"{name}: peak memory", *row, f"{peak['error']:+.1%}")
    step = result["step_seconds"]
    table.add_row("step", f"{step['estimated']:.3f} s", f"{step['measured']:.3f} s", f"{step['error']:+.1%}")
    Console().print(table)


def search_as_dict(search: LayoutSearch, top: int) -> dict[str, Any]:
    """The best layouts and what became of the rest, in plain types."""
    return {
        "hardware": search.hardware.name,
        "memory_bytes": round(search.hardware.memory_gib * 2**30),
        "legal_layouts": search.num_legal,
        "families": search.num_families,
        "simulated_families": search.num_estimated_families,
        "layouts": [
            {
                "overrides": search.overrides(layout),
                "needed_bytes": round(search.hardware.needed_bytes(layout.peak_bytes)),
                "loses_by": layout.loses_by,
                **_step_as_dict(layout.step),
            }
            for layout in search.ranked[:top]
        ],
    }


def show_search(result: dict[str, Any]) -> None:
    """A table of layouts, fastest first, and the overrides of the first to paste."""
    console = Console()
    if not result["layouts"]:
        console.print(
            f"none of {result['legal_layouts']} legal layouts fits into the "
            f"{_gib(result['memory_bytes'])} of {result['hardware']}; "
            "use more ranks, a smaller micro batch in the config, or a smaller model",
            soft_wrap=True,
        )
        return
    table = _table("layouts", ["tokens/s", "step", "memory", "MFU"])
    for place, layout in enumerate(result["layouts"], start=1):
        table.add_row(
            str(place),
            f"{layout['tokens_per_second']:,.0f}",
            f"{layout['seconds']:.4g} s",
            _gib(layout["needed_bytes"]),
            f"{layout['model_flops_utilization']:.1%}",
        )
    console.print(table)
    for place, layout in enumerate(result["layouts"], start=1):
        loss = f"; loses by {layout['loses_by']}" if layout["loses_by"] else ""
        console.print(f"{place}. {' '.join(layout['overrides'])}{loss}", soft_wrap=True, highlight=False)
    console.print(
        f"{result['legal_layouts']} layouts are legal, in {result['families']} families that differ in more "
        f"than their micro batch; the {result['simulated_families']} most promising were simulated on "
        f"{result['hardware']}. Paste what stands after a number behind the config's path.",
        soft_wrap=True,
    )


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _quantity(key: str, value: int) -> str:
    if key.endswith("bytes"):
        return f"{_gib(value)}"
    return f"{value:.4g}" if key == "flops" else f"{value:,}"


def _gib(count: float) -> str:
    return f"{count / 2**30:,.3f} GiB" if count >= 2**26 else f"{count / 2**20:,.3f} MiB"
