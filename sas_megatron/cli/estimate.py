"""`sas-megatron estimate`: memory, operations, communication and step time of a run without its cluster."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig
    from sas_megatron.planning.hardware_file import Hardware

THIS_MACHINE = "this-machine"


@click.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--world-size", type=int, required=True, help="Number of ranks: GPUs, or processes on CPU.")
@click.option(
    "--hardware",
    "hardware_name",
    default="h100",
    show_default=True,
    help="h100, h200, a100, this-machine (measured now), or the path of a hardware file.",
)
@click.option("--rank", type=int, help="Estimate only this rank; default: one rank of each kind of stage.")
@click.option("--search", is_flag=True, help="Rank the layouts that fit into memory.")
@click.option(
    "--memory-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory of one device, instead of the figure in the hardware file.",
)
@click.option(
    "--top", type=click.IntRange(min=1), default=8, show_default=True, help="Layouts that --search lists."
)
@click.option(
    "--validate", is_flag=True, help="Run the ranks as processes on this machine, at most 8, and compare."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of tables.")
def estimate(
    config: str,
    overrides: tuple[str, ...],
    *,
    world_size: int,
    hardware_name: str,
    rank: int | None,
    search: bool,
    memory_gib: float | None,
    top: int,
    validate: bool,
    as_json: bool,
) -> None:
    """Estimate a run of CONFIG on any number of ranks. OVERRIDES have the form section.field=value.

    The command builds the real model and runs its training step as one rank, on tensors without storage.
    It needs no GPU and no data.

    \f
    Raises:
        FieldError: The world size is not positive, or the layout or the engine does not permit an estimate.
        UserError: --search and --validate are used together.
    """
    from sas_megatron.config.errors import FieldError, UserError
    from sas_megatron.config.loading import load_run_config

    run_config = load_run_config(config, list(overrides))
    if world_size < 1:
        raise FieldError("world size", world_size, "must be positive", "use 1 or more")
    if search and validate:
        raise UserError("--search and --validate: exclude each other; use one of them")
    if run_config.training.engine != "megatron":
        raise run_config.training.problem("engine", "cannot be estimated yet", "set training.engine=megatron")
    if not search:
        run_config.check_world_size(world_size)
    if validate:
        result, show = _validate(run_config, world_size)
    else:
        hardware = _find_hardware(hardware_name, world_size, memory_gib)
        result, show = (
            _search(run_config, world_size, hardware, top)
            if search
            else _estimate(run_config, world_size, hardware, rank)
        )
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        show(result)


def _estimate(config: RunConfig, world_size: int, hardware: Hardware, rank: int | None) -> tuple[Any, Any]:
    _prepare_cpu()
    from sas_megatron.cli.estimate_tables import estimate_as_dict, show_estimate
    from sas_megatron.planning.run_estimate import estimate_run

    return (
        estimate_as_dict(estimate_run(config, world_size=world_size, hardware=hardware, rank=rank)),
        show_estimate,
    )


def _validate(config: RunConfig, world_size: int) -> tuple[Any, Any]:
    _prepare_cpu()
    from sas_megatron.cli.estimate_tables import show_validation, validation_as_dict
    from sas_megatron.planning.validation import validate_estimate

    return validation_as_dict(validate_estimate(config, world_size=world_size)), show_validation


def _search(config: RunConfig, world_size: int, hardware: Hardware, top: int) -> tuple[Any, Any]:
    _prepare_cpu()
    from sas_megatron.cli.estimate_tables import search_as_dict, show_search
    from sas_megatron.planning.layout_search import search_layouts

    result = search_layouts(
        config, world_size=world_size, hardware=hardware, report_progress=_report_progress
    )
    return search_as_dict(result, top), show_search


def _report_progress(text: str) -> None:
    """Update the progress line of a search on a terminal, since a search takes minutes."""
    if sys.stderr.isatty():
        click.echo(f"\r{text}", err=True, nl=False)


def _find_hardware(name: str, world_size: int, memory_gib: float | None) -> Hardware:
    from sas_megatron.planning.hardware_file import load_hardware

    hardware = _measure_this_machine(world_size) if name == THIS_MACHINE else load_hardware(name)
    return hardware if memory_gib is None else hardware.model_copy(update={"memory_gib": memory_gib})


def _measure_this_machine(world_size: int) -> Hardware:
    """Measure this machine, and write the figures to a file that --hardware accepts."""
    _prepare_cpu()
    from sas_megatron.config.loading import dump_tree
    from sas_megatron.io.files import save_file, user_cache_folder
    from sas_megatron.planning.machine_measurement import measure_this_machine

    num_processes = min(world_size, os.cpu_count() or 1)
    hardware = measure_this_machine(num_processes=num_processes)
    path = user_cache_folder() / f"this-machine-{num_processes}.yaml"
    text = dump_tree(hardware.model_dump(mode="json"))
    save_file(path, text, remedy="set XDG_CACHE_HOME to a writable folder")
    click.echo(f"wrote the measured figures of this machine to {path}", err=True)
    return hardware


def _prepare_cpu() -> None:
    """Prepare torch for tensors of the CPU, also on a machine with a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from sas_megatron.platform.device import prepare_device

    prepare_device()
