"""Output of `sas-megatron bench`: tables of at most 80 columns, JSON objects, and roofline plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from sas_megatron.benchmarks.roofline import Point

# (measure, value)
Rows = list[tuple[str, str]]

_BLOCKS = {
    "sas": "SAS block",
    "literal": "literal modules",
    "literal_compiled": "literal modules, compiled",
    "multi_head": "multi-head block",
}


def attention_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench attention`."""
    rows = [(_BLOCKS[name], f"{seconds * 1e3:.2f} ms") for name, seconds in result["seconds"].items()]
    rows += [
        (f"attention of the {_BLOCKS[name]}", operator or "unfused products")
        for name, operator in result["fused_attention"].items()
    ]
    rows.append(("literal / SAS", f"{result['literal_over_sas']:.2f}"))
    if result["literal_compiled_over_sas"] is not None:
        rows.append(("literal, compiled / SAS", f"{result['literal_compiled_over_sas']:.2f}"))
    return [
        *rows,
        ("SAS / multi-head", f"{result['sas_over_multi_head']:.2f}"),
        ("saved for backward, SAS / literal", f"{result['kept_share_of_literal']:.0%}"),
        ("peak memory, SAS / literal", _share(result["peak_share_of_literal"])),
    ]


def simulation_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench simulation`."""
    rows = [
        (name, f"{row['seconds'] * 1e3:.3f} ms, {row['over_floor']:.2f} × the floor")
        for name, row in result["rows"].items()
    ]
    if "fused forward" not in result["rows"]:
        rows.append(("fused", "not measured: no GPU"))
    for name, ratio in result["plain_over_fused"].items():
        if ratio is not None:
            rows.append((f"plain / fused, {name}", f"{ratio:.2f}"))
    ceilings = result["ceilings"]
    return [
        *rows,
        ("large copy", f"{ceilings['copied_bytes_per_second'] / 1e9:,.1f} GB/s"),
        ("large matrix product", f"{ceilings['matrix_flops_per_second'] / 1e12:,.2f} TFLOP/s"),
        *tile_rows(result.get("sweep", [])),
    ]


def tile_rows(sweep: list[dict[str, Any]]) -> Rows:
    """Return the time of each kernel with its default tile, which comes first, and with the fastest tile."""
    rows = []
    for kernel in dict.fromkeys(row["kernel"] for row in sweep):
        default, *_ = measured = [row for row in sweep if row["kernel"] == kernel]
        timed = [row for row in measured if row["seconds"] is not None]
        if not timed:
            rows.append((kernel, f"no tile could be timed: {default['problem']}"))
            continue
        best = min(timed, key=lambda row: row["seconds"])
        before = "none" if default["seconds"] is None else f"{default['seconds'] * 1e3:.3f}"
        rows.append((kernel, f"{before} -> {best['seconds'] * 1e3:.3f} ms of the pass"))
        tile = ", ".join(f"{best[name]} {name}" for name in ("rows", "warps", "stages", "programs"))
        rows.append(("  fastest tile", tile))
    return rows


def step_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench step`: both runs, then the ratios of the second to the first."""
    rows = []
    for name, row in zip(("BASE", "OTHER"), result["rows"].values(), strict=True):
        rows += [
            (f"{name}, time of a step", f"{row['seconds']:.4f} s"),
            (f"{name}, share of the peak", f"{row['flops_utilization']:.1%}"),
            (f"{name}, with the causal half", f"{row['flops_utilization_causal']:.1%}"),
        ]
    if "transformers_seconds" in result:
        rows += [
            ("transformers, time of a step", f"{result['transformers_seconds']:.4f} s"),
            ("transformers / BASE, time", f"{result['transformers_over_base']:.3f}"),
        ]
    return [
        *rows,
        ("OTHER / BASE, parameters", f"{result['parameter_ratio']:.3f}"),
        ("OTHER / BASE, time", f"{result['time_ratio']:.3f}"),
        ("OTHER / BASE, FLOPs", f"{result['flops_ratio']:.3f}"),
        ("OTHER / BASE, time / FLOPs", f"{result['time_over_flops']:.3f}"),
        ("peak", f"{result['peak_flops_per_second'] / 1e12:,.2f} TFLOP/s"),
        ("source of the peak", result["peak_is_of"]),
    ]


def loop_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench loop`."""
    rows = [(name, f"{seconds * 1e3:.2f} ms") for name, seconds in result["seconds"].items()]
    return [*rows, ("loop / step", f"{result['share_of_step']:.2%}")]


def read_delay_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench loop --read-delay-ms`."""
    delay = f"{result['delay_seconds'] * 1e3:g} ms more for each sample"
    return [
        ("samples of a step", str(result["samples_per_step"])),
        ("step", f"{result['plain_seconds'] * 1e3:.1f} ms"),
        (f"step, {delay}", f"{result['delayed_seconds'] * 1e3:.1f} ms"),
        ("ratio", f"{result['ratio']:.3f}"),
    ]


def data_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench data`."""
    megatron_lm = []
    if result["megatron_lm_seconds"] is not None:
        ratio = result["megatron_lm_seconds"] / result["command_seconds"]
        megatron_lm = [
            ("Megatron-LM's script", f"{result['megatron_lm_seconds']:.2f} s"),
            ("Megatron-LM's script / command", f"{ratio:.2f}"),
        ]
    return [
        ("data prepare", f"{result['prepare_tokens_per_second']:,.0f} tokens/s"),
        (f"{result['workers']} bare processes", f"{result['bare_tokens_per_second']:,.0f} tokens/s"),
        ("ratio", f"{result['ratio']:.2f}"),
        ("complete command", f"{result['command_seconds']:.2f} s"),
        *megatron_lm,
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
        (
            "peak memory, corpus three times as long",
            f"{result['peak_memory_bytes_of_triple'] / 2**20:.0f} MiB",
        ),
    ]


def checkpoint_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench checkpoint`."""
    seconds = result["seconds"]
    return [
        ("one copy in memory", f"{seconds['copy']:.3f} s"),
        ("training blocked by an asynchronous save", f"{seconds['blocked']:.3f} s"),
        ("blocked / copy", f"{result['blocked_over_copy']:.2f}"),
        ("save, checksums included", f"{seconds['save']:.3f} s"),
        ("save without checksums", f"{seconds['unhashed']:.3f} s"),
        ("checksums / save", f"{result['hashing_exposed']:.1%}"),
        ("dd conv=fsync", f"{seconds['dd']:.3f} s"),
        ("rate of a save / rate of dd", f"{result['save_rate_over_dd']:.2f}"),
    ]


def scoring_rows(result: dict[str, Any]) -> Rows:
    """Return the rows of `bench scoring`."""
    return [
        (f"{kind}, {name}", f"{result[kind][name]:.2f}" if name == "ratio" else f"{rate:,.0f} tokens/s")
        for kind in ("choices", "texts")
        for name, rate in result[kind].items()
    ]


def show(result: dict[str, Any], rows: Rows, *, as_json: bool) -> None:
    """Print the rows as a table, or the complete result as a JSON object."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{_machine_name(result)}, {result['date']}")
    table = Table("measure")
    table.add_column("median", justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def draw(points: list[Point], output: Path, result: dict[str, Any]) -> None:
    """Write a PNG of the points under the roofline of the measured ceilings."""
    from sas_megatron.benchmarks.roofline import Ceilings, draw_roofline
    from sas_megatron.io.files import save_file

    title = f"{_machine_name(result)}, {result['precision']}, {result['date']}"
    drawing = draw_roofline(points, Ceilings(**result["ceilings"]), title=title)
    save_file(output, drawing, remedy="name another file")


def machine_and_threads(device: torch.device) -> dict[str, Any]:
    """Return the fields `machine`, `threads` and `date` of a result."""
    import torch

    from sas_megatron.platform.device import describe_machine

    return {"threads": torch.get_num_threads(), **machine_and_date(describe_machine(device))}


def machine_and_date(machine: dict[str, object]) -> dict[str, Any]:
    """Return the fields `machine` and `date` of a result."""
    import datetime

    return {"machine": machine, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _machine_name(result: dict[str, Any]) -> str:
    return str(result["machine"].get("gpu") or result["machine"]["processor"])


def _share(share: float | None) -> str:
    """Format a share of the memory of a GPU, which is None on a CPU."""
    return "not measured: no GPU" if share is None else f"{share:.0%}"
