"""Options that several commands of `sas-megatron bench` share, and the device that they measure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

POSITIVE = click.IntRange(min=1)
THREADS_OPTION = click.option("--threads", type=POSITIVE, help="CPU threads; default: one per processor.")
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a table.")
OUTPUT_OPTION = click.option(
    "--output", type=click.Path(path_type=Path), help="PNG file for a plot of the results under the roofline."
)
ROUNDS_HELP = "Rounds after two warm-up rounds."


def shape_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the sizes of an attention block, its precision, threads and rounds."""
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
        click.option("--repeats", type=POSITIVE, default=9, show_default=True, help=ROUNDS_HELP),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def prepare(threads: int | None) -> torch.device:
    """Return the device. On a CPU, use the given number of threads, or one per processor."""
    import os

    from sas_megatron.platform.device import prepare_device

    device = prepare_device()

    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    return device
