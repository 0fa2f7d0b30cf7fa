"""How `sas-megatron bench` shows what it measured: as a table, as JSON, and under a roofline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from sas_megatron.benchmarks.roofline import Point


def draw(points: list[Point], output: Path, result: dict[str, Any]) -> None:
    """A PNG of the points under the roofline of the result's ceilings."""
    from sas_megatron.benchmarks.ceilings import Ceilings
    from sas_megatron.benchmarks.roofline import draw_roofline
    from sas_megatron.io.files import save_file

    title = f"{_machine(result)}, {result['precision']}, {result['date']}"
    drawing = draw_roofline(points, Ceilings(**result["ceilings"]), title=title)
    save_file(output, drawing, remedy="name another file")


def best_tiles(sweep: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Of each kernel the usual tile, which comes first, and the fastest, if any could be timed."""
    rows = []
    for kernel in dict.fromkeys(row["kernel"] for row in sweep):
        usual, *_ = tried = [row for row in sweep if row["kernel"] == kernel]
        timed = [row for row in tried if row["seconds"] is not None]
        if not timed:
            rows.append((kernel, f"no tile could be timed: {usual['problem']}"))
            continue
        best = min(timed, key=lambda row: row["seconds"])
        tile = ", ".join(f"{best[name]} {name}" for name in ("rows", "warps", "stages", "programs"))
        before = "none" if usual["seconds"] is None else f"{usual['seconds'] * 1e3:.3f}"
        rows.append((kernel, f"{before} -> {best['seconds'] * 1e3:.3f} ms of the pass: {tile}"))
    return rows


def share(share: float | None) -> str:
    """Of a GPU's memory, or that there is none."""
    return "not measured: no GPU" if share is None else f"{share:.0%}"


def place(device: torch.device) -> dict[str, Any]:
    """Machine, threads and date."""
    import torch

    from sas_megatron.platform.device import describe_machine

    return {"threads": torch.get_num_threads(), **stamp(describe_machine(device))}


def stamp(machine: dict[str, object]) -> dict[str, Any]:
    """Machine and date."""
    import datetime

    return {"machine": machine, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _machine(result: dict[str, Any]) -> str:
    return str(result["machine"].get("gpu") or result["machine"]["processor"])


def show(result: dict[str, Any], as_json: bool, rows: list[tuple[str, str]]) -> None:
    """Prints the rows, or the whole result as an object."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{_machine(result)}, {result['date']}")
    table.add_column("measure")
    table.add_column("median", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
