"""Options that commands of `sas-megatron bench` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click

POSITIVE = click.IntRange(min=1)
THREADS_OPTION = click.option("--threads", type=POSITIVE, help="CPU threads; by default one a processor.")
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
OUTPUT_OPTION = click.option(
    "--output", type=click.Path(path_type=Path), help="PNG to draw the measurements in, under the roofline."
)


def shape_options(command: Callable[..., None]) -> Callable[..., None]:
    """Sizes of a block of self-attention, precision and rounds."""
    sizes = {
        "num-heads": 12,
        "head-expansion": 3,
        "head-dim": 64,
        "simulated-head-dim": 96,
        "kernel-size": 3,
        "sequence-length": 512,
        "batch-size": 2,
    }
    options = [
        *(
            click.option(f"--{name}", type=POSITIVE, default=size, show_default=True)
            for name, size in sizes.items()
        ),
        click.option(
            "--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
        ),
        THREADS_OPTION,
        click.option(
            "--repeats",
            type=POSITIVE,
            default=9,
            show_default=True,
            help="Rounds, after two that warm up.",
        ),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)
