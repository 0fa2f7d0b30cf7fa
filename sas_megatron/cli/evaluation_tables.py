"""The tables of `sas-megatron evaluate`. They are readable in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Window lengths per table of losses by position, so that a table fits into 80 columns.
_LENGTHS_PER_TABLE = 6


def show_held_out(results: dict[str, Any]) -> None:
    """Print the loss by window length and domain, then by position in the window, then the remarks."""
    by_length = results["by_length"]
    table = _new_table(f"Held-out loss (training length: {results['trained_length']:,} tokens)")
    table.add_column("length", no_wrap=True)
    table.add_column("stride", no_wrap=True)
    table.add_column("domain", overflow="fold")
    for heading in ("loss", "perplexity", "bits/byte", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in by_length:
        losses = list(row["domains"].items())
        if len(losses) > 1:
            losses.append(("all", row["all"]))
        for name, loss in losses:
            table.add_row(f"{row['sequence_length']:,}", f"{row['stride']:,}", name, *_cells(loss))
    console = Console()
    console.print(table)
    for begin in range(0, len(by_length), _LENGTHS_PER_TABLE):
        console.print(_tabulate_positions(by_length[begin : begin + _LENGTHS_PER_TABLE]))
    for remark in results.get("remarks", ()):
        console.print(f"· {remark}", markup=False, highlight=False, soft_wrap=True)


def _new_table(title: str) -> Table:
    """Return a table without vertical lines, which would take columns from the text."""
    return Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))


def _tabulate_positions(by_length: Sequence[dict[str, Any]]) -> Table:
    table = _new_table("Loss by number of preceding tokens, for each window length")
    table.add_column("preceding", no_wrap=True)
    for row in by_length:
        table.add_column(f"{row['sequence_length']:,}", justify="right", no_wrap=True)
    columns = [
        {tuple(bucket["tokens_read"]): bucket["loss"] for bucket in row["all"]["by_position"]}
        for row in by_length
    ]
    for first, last in sorted({bucket for column in columns for bucket in column}):
        losses = [column.get((first, last)) for column in columns]
        table.add_row(
            f"{first:,}" if first == last else f"{first:,}–{last:,}",
            *("" if loss is None else f"{loss:.4f}" for loss in losses),
        )
    return table


def _cells(loss: dict[str, Any]) -> list[str]:
    bits = loss["bits_per_byte"]
    perplexity = loss["perplexity"]
    return [
        f"{loss['loss']:.4f}",
        f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}",
        "" if bits is None else f"{bits:.4f}",
        f"{loss['num_tokens']:,}",
    ]


def show_tasks(results: dict[str, Any]) -> None:
    """Print every metric of every task under the names of the harness."""
    table = _new_table(f"lm-eval {results['lm_eval']}")
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "± std. error", "few-shot"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, metrics in {**results["results"], **results["groups"]}.items():
        for key, value in metrics.items():
            name, _, variant = key.partition(",")
            if not isinstance(value, int | float) or not variant or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{variant}")
            table.add_row(
                task,
                name if variant == "none" else f"{name} ({variant})",
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, int | float) else "",
                str(results["num_fewshot"].get(task, "")),
            )
    Console().print(table)
