"""The tables of `sas-megatron evaluate`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_held_out(results: dict[str, Any]) -> None:
    """Loss by length and domain; of each length, by position in the context."""
    by_length = results["by_length"]
    table = Table(
        title=f"Held-out loss (trained on {results['trained_length']:,} tokens)", title_justify="left"
    )
    for heading in ("tokens", "stride", "domain"):
        table.add_column(heading)
    for heading in ("loss", "perplexity", "bits per byte", "of tokens"):
        table.add_column(heading, justify="right")
    for row in by_length:
        shown = list(row["domains"].items())
        if len(shown) > 1:
            shown.append(("all", row["all"]))
        for name, loss in shown:
            table.add_row(f"{row['sequence_length']:,}", f"{row['stride']:,}", name, *_cells(loss))
    Console().print(table)
    positions = Table(title="By tokens read, over all domains", title_justify="left")
    positions.add_column("read")
    for row in by_length:
        positions.add_column(f"{row['sequence_length']:,} tokens", justify="right")
    columns = [
        {tuple(bucket["tokens_read"]): bucket["loss"] for bucket in row["all"]["by_position"]}
        for row in by_length
    ]
    for first, last in sorted({bucket for column in columns for bucket in column}):
        losses = [column.get((first, last)) for column in columns]
        positions.add_row(
            f"{first:,}" if first == last else f"{first:,}–{last:,}",
            *("" if loss is None else f"{loss:.4f}" for loss in losses),
        )
    Console().print(positions)


def _cells(loss: dict[str, Any]) -> list[str]:
    bits = loss["bits_per_byte"]
    return [
        f"{loss['loss']:.4f}",
        f"{loss['perplexity']:.2f}",
        "" if bits is None else f"{bits:.4f}",
        f"{loss['num_tokens']:,}",
    ]


def show_tasks(results: dict[str, Any]) -> None:
    """Every metric of every task, as the harness names them."""
    table = Table(title=f"lm-eval {results['lm_eval']}", title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("value", "± standard error", "few-shot"):
        table.add_column(heading, justify="right")
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
