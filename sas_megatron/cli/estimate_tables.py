"""Output of `sas-megatron estimate`: estimates, validations and searches as JSON objects and as tables.

Tables are at most 80 columns wide; a test holds that.
"""

from __future__ import annotations

from collections import Counter
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
    """Return the estimate as plain types. Bytes and FLOPs are per rank and per optimizer step."""
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
        "savings": estimate.savings.as_dict(),
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
    "attended_heads": "attention heads",
    "parameters": "parameters",
    "parameter_bytes": "weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "peak_activation_bytes": "activations, temporaries",
    "peak_bytes": "peak memory",
    "microbatches": "microbatches per step",
    "flops": "FLOPs per step",
}

# Prefix of the names of torch's operations -> name of the collective in tables.
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}


def show_estimate(result: dict[str, Any]) -> None:
    """Print the memory and the work of the ranks, the bytes that they send, and the seconds of a step."""
    console = Console()
    ranks = result["ranks"]
    headings = [f"rank {rank['rank']}" for rank in ranks]
    table = _table("memory and work", headings)
    for key, label in _RANK_ROWS.items():
        table.add_row(label, *(_quantity(key, rank[key]) for rank in ranks))
    console.print(table)
    sent = [_sum_by_collective(rank["communication_bytes_sent"]) for rank in ranks]
    if any(sent):
        table = _table("communication: bytes sent per step", headings)
        for label in dict.fromkeys(label for counts in sent for label in counts):
            table.add_row(label, *(_bytes(counts[label]) for counts in sent))
        console.print(table)
    _show_step(console, result["step"])
    _show_savings(console, result["savings"])
    verdict = "fits" if result["fits"] else "does not fit"
    console.print(
        f"{verdict}: a rank needs {_bytes(result['needed_bytes_with_allocator_and_reserve'])} of the "
        f"{_bytes(result['memory_bytes'])} of {result['hardware']}. World size {result['world_size']}, "
        f"{result['data_parallel']} data-parallel."
    )
    console.print(
        "A multiply-add counts as two FLOPs, and fused attention counts all S² scores. Bytes sent follow the "
        "ring convention. Communication overlaps with computation only as parallel.overlap_* states. The "
        "attained shares of the peak rates are the hardware file's."
    )


def _sum_by_collective(bytes_sent: dict[str, dict[str, int]]) -> Counter[str]:
    """Sum the bytes of torch's variants of each collective, such as `allgather_base`, in each group."""
    total: Counter[str] = Counter()
    for group, operations in bytes_sent.items():
        for operation, count in operations.items():
            names = [name for prefix, name in _COLLECTIVES.items() if operation.startswith(prefix)]
            total[f"{group} {names[0] if names else operation}"] += count
    return total


def _show_step(console: Console, step: dict[str, Any]) -> None:
    table = _table("time of a step", ["seconds", "share"])
    for term, seconds in step["seconds_by_term"].items():
        table.add_row(term, f"{seconds:.4g}", f"{seconds / step['seconds']:.1%}")
    table.add_section()
    table.add_row("total", f"{step['seconds']:.4g}", "")
    table.add_row("tokens/s", f"{step['tokens_per_second']:,.0f}", "")
    table.add_row("pipeline bubble", f"{step['pipeline_bubble']:.1%}", "")
    table.add_row("model FLOPs utilization", f"{step['model_flops_utilization']:.1%}", "")
    console.print(table)


def _show_savings(console: Console, savings: dict[str, Any]) -> None:
    table = _table("savings in a step", ["saves", "costs"])
    # Costs of the chunked loss, whether it is selected or not.
    table.add_row(
        f"model.output_loss=chunked ({savings['output_loss']} here)",
        _bytes(savings["logits_bytes"]),
        f"{savings['logits_seconds']:.2g} s",
    )
    table.add_row(
        f"reads of the device ({savings['device_reads']} left)",
        f"{savings['saved_device_reads']}, {savings['saved_read_seconds']:.2g} s",
        "nothing",
    )
    table.add_row(
        "reading samples ahead",
        f"{1e3 * savings['hidden_read_seconds']:.3g} ms a sample",
        f"{_bytes(savings['host_bytes'])} of host",
    )
    console.print(table)


def validation_as_dict(validation: Validation) -> dict[str, Any]:
    """Return estimates, measurements and errors by rank, as plain types."""
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
    """Print one table: bytes sent by group and peak memory of each rank, and the time of a step."""
    table = _table("estimate and measurement", ["estimated", "measured", "error"])
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
    """Return the `top` fastest layouts, and the numbers of layouts considered, as plain types."""
    return {
        "hardware": search.hardware.name,
        "memory_bytes": round(search.hardware.memory_gib * 2**30),
        "legal_layouts": search.num_legal,
        "families": search.num_families,
        "estimated_families": search.num_estimated_families,
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
    """Print a table of the layouts, fastest first, and their overrides, one layout per line."""
    console = Console()
    if not result["layouts"]:
        console.print(
            f"none of {result['legal_layouts']} legal layouts fits into the "
            f"{_bytes(result['memory_bytes'])} of {result['hardware']}; "
            "use more ranks, a smaller micro batch in the config, or a smaller model"
        )
        return
    table = _table("layouts", ["tokens/s", "step", "memory", "MFU"])
    for number, layout in enumerate(result["layouts"], start=1):
        table.add_row(
            str(number),
            f"{layout['tokens_per_second']:,.0f}",
            f"{layout['seconds']:.4g} s",
            _bytes(layout["needed_bytes"]),
            f"{layout['model_flops_utilization']:.1%}",
        )
    console.print(table)
    for number, layout in enumerate(result["layouts"], start=1):
        loss = f"; loses by {layout['loses_by']}" if layout["loses_by"] else ""
        # A line is not broken, so that its overrides can be copied.
        console.print(f"{number}. {' '.join(layout['overrides'])}{loss}", soft_wrap=True, highlight=False)
    console.print(
        f"{result['legal_layouts']} layouts are legal, in {result['families']} families whose layouts differ "
        f"only in the micro batch. The {result['estimated_families']} most promising families were estimated "
        f"on {result['hardware']}. Append the overrides of a layout to the command line."
    )


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _quantity(key: str, value: int) -> str:
    if key.endswith("bytes"):
        return _bytes(value)
    return f"{value:.4g}" if key == "flops" else f"{value:,}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.3f} {unit}"
    return f"{count:,.0f} B"
