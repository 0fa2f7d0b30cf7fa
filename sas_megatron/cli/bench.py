"""`sas-megatron bench`: measurements of this machine, as ratios within one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sas_megatron.cli.bench_options import (
    JSON_OPTION,
    OUTPUT_OPTION,
    POSITIVE,
    THREADS_OPTION,
    shape_options,
)
from sas_megatron.cli.bench_tables import best_tiles, draw, place, share, show, stamp

if TYPE_CHECKING:
    import torch


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command()
@shape_options
@click.option(
    "--compile/--no-compile", "compiled", default=False, help="Also torch.compile the literal form."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "fused", "unfused", "cudnn"]),
    default="auto",
    show_default=True,
    help="attention.backend of both blocks of ours.",
)
@OUTPUT_OPTION
@JSON_OPTION
def attention(
    precision: str,
    threads: int | None,
    repeats: int,
    compiled: bool,
    backend: str,
    output: Path | None,
    as_json: bool,
    **sizes: int,
) -> None:
    """Time the SAS block, forward and backward, against its literal form and against multi-head."""
    device = _prepare(threads)

    from sas_megatron.benchmarks.attention import measure_attention, points_of
    from sas_megatron.benchmarks.block_shape import BlockShape
    from sas_megatron.config.parallel import ParallelConfig
    from sas_megatron.distributed.topology import joined_topology
    from sas_megatron.model.assembly import DTYPES

    with joined_topology(ParallelConfig(), device=device, seed=1, timeout_minutes=1) as topology:
        result = measure_attention(
            BlockShape(**sizes),
            topology,
            dtype=DTYPES[precision],
            repeats=repeats,
            compiled=compiled,
            backend=backend,
        )
    result = {"shape": sizes, "precision": precision, "backend": backend, **result, **place(device)}
    if output is not None:
        draw(points_of(result), output, result)
    titles = {
        "sas": "SAS block",
        "literal": "literal modules",
        "literal_compiled": "literal modules, compiled",
        "multi_head": "multi-head block",
    }
    rows = [(titles[name], f"{seconds * 1e3:.2f} ms") for name, seconds in result["seconds"].items()]
    rows += [
        (f"attention of the {titles[name]}", operator or "plain products")
        for name, operator in result["fused_attention"].items()
    ]
    rows.append(("literal / SAS", f"{result['literal_over_sas']:.2f}"))
    if compiled:
        rows.append(("literal, compiled / SAS", f"{result['literal_compiled_over_sas']:.2f}"))
    rows += [
        ("SAS / multi-head", f"{result['sas_over_multi_head']:.2f}"),
        ("kept for the backward pass, SAS / literal", f"{result['kept_share_of_literal']:.0%}"),
        ("memory at the peak, SAS / literal", share(result["peak_share_of_literal"])),
    ]
    show(result, as_json, rows)


@bench.command()
@shape_options
@click.option("--sweep", is_flag=True, help="Also time every fused kernel with other tiles; needs a GPU.")
@OUTPUT_OPTION
@JSON_OPTION
def simulation(
    precision: str,
    threads: int | None,
    repeats: int,
    sweep: bool,
    output: Path | None,
    as_json: bool,
    **sizes: int,
) -> None:
    """Time the head and feature simulation alone, against the floor of its bytes and FLOPs."""
    device = _prepare(threads)
    _refuse_without_gpu(device, sweep)

    from sas_megatron.benchmarks.block_shape import BlockShape
    from sas_megatron.benchmarks.simulation import measure_simulation, points_of
    from sas_megatron.model.assembly import DTYPES

    shape, dtype = BlockShape(**sizes), DTYPES[precision]
    result = measure_simulation(shape, device=device, dtype=dtype, repeats=repeats)
    result = {"shape": sizes, "precision": precision, **result, **place(device)}
    if sweep:
        from sas_megatron.benchmarks.tile_sweep import sweep_tiles

        result["sweep"] = sweep_tiles(shape, device=device, dtype=dtype, repeats=repeats)
    if output is not None:
        draw(points_of(result), output, result)
    rows = [
        (name, f"{row['seconds'] * 1e3:.3f} ms, {row['over_floor']:.2f} × the floor")
        for name, row in result["rows"].items()
    ]
    if device.type != "cuda":
        rows.append(("fused", "not measured: no GPU"))
    for name, ratio in result["plain_over_fused"].items():
        if ratio is not None:
            rows.append((f"plain / fused, {name}", f"{ratio:.2f}"))
    ceilings = result["ceilings"]
    rows += [
        ("a large copy", f"{ceilings['copied_bytes_per_second'] / 1e9:,.1f} GB/s"),
        ("a large product", f"{ceilings['matrix_flops_per_second'] / 1e12:,.2f} TFLOP/s"),
        *best_tiles(result.get("sweep", [])),
    ]
    show(result, as_json, rows)


@bench.command()
@click.argument("base", type=click.Path())
@click.argument("other", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--microbatches", type=POSITIVE, default=2, show_default=True, help="Of a step.")
@click.option("--rounds", type=POSITIVE, default=3, show_default=True)
@JSON_OPTION
def step(
    base: str, other: str, overrides: tuple[str, ...], microbatches: int, rounds: int, as_json: bool
) -> None:
    """Time whole training steps of OTHER against BASE, beside their FLOPs, on one copy of each model.

    OVERRIDES (section.field=value) apply to both.
    """
    from sas_megatron.config.loading import load_run_config

    configs = {path: load_run_config(path, list(overrides)) for path in (base, other)}
    device = _prepare(None)

    from sas_megatron.benchmarks.step_comparison import measure_steps, with_microbatches

    result = measure_steps(
        {path: with_microbatches(config, microbatches) for path, config in configs.items()},
        device=device,
        rounds=rounds,
    )
    rows = [
        (
            path,
            f"{row['seconds']:.4f} s, {row['flops_utilization']:.1%} of the peak "
            f"({row['flops_utilization_causal']:.1%} by the causal half)",
        )
        for path, row in result["rows"].items()
    ]
    rows += [
        ("parameters", f"{result['parameter_ratio']:.3f}"),
        ("time", f"{result['time_ratio']:.3f}"),
        ("FLOPs", f"{result['flops_ratio']:.3f}"),
        ("time / FLOPs", f"{result['time_over_flops']:.3f}"),
        ("the peak", f"{result['peak_flops_per_second'] / 1e12:,.2f} TFLOP/s ({result['peak_is_of']})"),
    ]
    show({**result, **place(device)}, as_json, rows)


@bench.command()
@click.argument("config", type=click.Path(), default="configs/125m/mha.yaml")
@click.argument("overrides", nargs=-1)
@click.option("--steps", type=POSITIVE, default=20, show_default=True, help="After three that warm up.")
@JSON_OPTION
def loop(config: str, overrides: tuple[str, ...], steps: int, as_json: bool) -> None:
    """Measure what the training loop takes beside forward, backward and optimizer, in a real run of CONFIG.

    OVERRIDES (section.field=value) apply to it; the data are made up.
    """
    import contextlib
    import sys
    import tempfile

    from sas_megatron.config.loading import load_run_config

    loaded = load_run_config(config, list(overrides))
    device = _prepare(None)

    from sas_megatron.benchmarks.loop import measure_loop, on_made_up_data
    from sas_megatron.distributed.topology import joined_topology

    with tempfile.TemporaryDirectory() as folder:
        run = on_made_up_data(loaded, Path(folder), num_steps=steps)
        with (
            # The run's own console, which would stand amid the result.
            contextlib.redirect_stdout(sys.stderr),
            joined_topology(run.parallel, device=device, seed=1, timeout_minutes=10) as topology,
        ):
            result = measure_loop(run, topology)
    rows = [(name, f"{seconds * 1e3:.2f} ms") for name, seconds in result["seconds"].items()]
    rows.append(("loop / step", f"{result['share_of_step']:.2%}"))
    show({"config": config, "overrides": overrides, **result, **place(device)}, as_json, rows)


@bench.command()
@click.option(
    "--tokenizer", "tokenizer_path", type=click.Path(path_type=Path), help="By default one is trained."
)
@click.option(
    "--source", type=click.Path(path_type=Path), help="Parquet file with a column text; by default builtin."
)
@click.option("--workers", type=POSITIVE, default=2, show_default=True)
@click.option("--repeats", type=POSITIVE, default=5, show_default=True)
@click.option(
    "--megatron-lm",
    type=click.Path(path_type=Path),
    help="Checkout of Megatron-LM, whose own script then takes part.",
)
@JSON_OPTION
def data(
    tokenizer_path: Path | None,
    source: Path | None,
    workers: int,
    repeats: int,
    megatron_lm: Path | None,
    as_json: bool,
) -> None:
    """Speed of `data prepare` against as many concurrent processes of sentencepiece alone."""
    import tempfile

    from sas_megatron.benchmarks.data import measure_preparation
    from sas_megatron.data.corpus import builtin_corpus
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.tokenizer_training import train_tokenizer
    from sas_megatron.platform.local_machine import describe_processor

    source = source or builtin_corpus()
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer_path is None:
            tokenizer_path = Path(folder) / "tokenizer.model"
            train_tokenizer(stream_documents([source]), vocab_size=8192, model_path=tokenizer_path)
        result = measure_preparation(
            source, tokenizer_path, workers=workers, repeats=repeats, megatron_lm=megatron_lm
        )
    others = []
    if result["megatron_lm_seconds"] is not None:
        faster = result["megatron_lm_seconds"] / result["command_seconds"]
        others.append(("Megatron-LM's", f"{result['megatron_lm_seconds']:.2f} s, {faster:.2f} times as long"))
    rows = [
        ("data prepare", f"{result['prepare_tokens_per_second']:,.0f} tokens/s"),
        (f"{workers} bare processes", f"{result['bare_tokens_per_second']:,.0f} tokens/s"),
        ("ratio", f"{result['ratio']:.2f}"),
        ("the whole command", f"{result['command_seconds']:.2f} s"),
        *others,
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
        ("of a corpus three times as long", f"{result['peak_memory_bytes_of_triple'] / 2**20:.0f} MiB"),
    ]
    show({**result, **stamp(describe_processor())}, as_json, rows)


@bench.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path(),
    help="On the disk to measure; default: here.",
)
@click.option(
    "--gigabytes",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="10⁹ bytes, in memory four times.",
)
@click.option("--repeats", type=POSITIVE, default=5, show_default=True)
@JSON_OPTION
def checkpoint(directory: Path, gigabytes: float, repeats: int, as_json: bool) -> None:
    """Time that saving takes from training, and its rate, against one copy in memory and against dd."""
    import tempfile

    from sas_megatron.platform.device import prepare_device

    device = prepare_device()

    from sas_megatron.benchmarks.checkpointing import measure_checkpointing
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.config.shipped_configs import shipped_configs
    from sas_megatron.distributed.topology import joined_topology

    # Any run of one process: it says how to save, and is written into the checkpoint.
    config = load_run_config(shipped_configs() / "quickstart_mha.yaml", ["parallel.tensor=1"])
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix="bench_checkpoint_") as folder,
        joined_topology(config.parallel, device=device, seed=1, timeout_minutes=10) as topology,
    ):
        result = measure_checkpointing(Path(folder), config, topology, gigabytes=gigabytes, repeats=repeats)
    seconds = result["seconds"]
    rows = [
        ("one copy in memory", f"{seconds['copy']:.3f} s"),
        ("blocked by an asynchronous save", f"{seconds['blocked']:.3f} s"),
        ("blocked / copy", f"{result['blocked_over_copy']:.2f}"),
        ("save, checksums included", f"{seconds['save']:.3f} s"),
        ("dd conv=fsync", f"{seconds['dd']:.3f} s"),
        ("rate of a save / of dd", f"{result['save_rate_over_dd']:.2f}"),
    ]
    show({**result, **place(device)}, as_json, rows)


@bench.command()
@click.option("--config", type=click.Path(), help="A run's, whose model scores; by default quickstart_sas.")
@click.option("--num-tokens", type=POSITIVE, default=40_000, show_default=True, help="Of a measurement.")
@click.option("--batch-tokens", type=POSITIVE, default=8192, show_default=True)
@THREADS_OPTION
@click.option(
    "--repeats",
    type=POSITIVE,
    default=5,
    show_default=True,
    help="Rounds, after two that warm up.",
)
@JSON_OPTION
def scoring(
    config: str | None, num_tokens: int, batch_tokens: int, threads: int | None, repeats: int, as_json: bool
) -> None:
    """Rate of scoring passages, as `evaluate` does, against the bare forward pass of the same model."""
    device = _prepare(threads)

    import torch

    from sas_megatron.benchmarks.scoring import measure_scoring
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.config.shipped_configs import shipped_configs
    from sas_megatron.distributed.topology import joined_topology

    run = load_run_config(config or shipped_configs() / "quickstart_sas.yaml", ["parallel.tensor=1"])
    with joined_topology(run.parallel, device=device, seed=1, timeout_minutes=10) as topology:
        result = measure_scoring(
            run, topology, num_tokens=num_tokens, batch_tokens=batch_tokens, repeats=repeats
        )
    show(
        {**result, "threads": torch.get_num_threads(), **place(device)},
        as_json,
        [
            (f"{kind}, {name}", f"{result[kind][name]:.2f}" if name == "ratio" else f"{rate:,.0f} tokens/s")
            for kind in ("choices", "texts")
            for name, rate in result[kind].items()
        ],
    )


def _prepare(threads: int | None) -> torch.device:
    """The device, and on a CPU as many threads as there are processors, or as asked for."""
    import os

    from sas_megatron.platform.device import prepare_device

    device = prepare_device()

    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    return device


def _refuse_without_gpu(device: torch.device, sweep: bool) -> None:
    from sas_megatron.config.errors import UserError

    if sweep and device.type != "cuda":
        raise UserError("--sweep: the fused kernels need a CUDA device; leave it out")
