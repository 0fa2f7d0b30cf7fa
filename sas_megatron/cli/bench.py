"""`sas-megatron bench`: measurements of this machine, reported as ratios within one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sas_megatron.cli import bench_tables as tables
from sas_megatron.cli.bench_options import (
    JSON_OPTION,
    OUTPUT_OPTION,
    POSITIVE,
    ROUNDS_HELP,
    THREADS_OPTION,
    prepare,
    shape_options,
)
from sas_megatron.config.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command()
@shape_options
@click.option(
    "--compile/--no-compile", "compiled", default=False, help="Also time the literal form with torch.compile."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "fused", "unfused", "cudnn"]),
    default="auto",
    show_default=True,
    help="attention.backend of the SAS block and of the multi-head block.",
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
    """Time an SAS block against literal SAS and multi-head.

    Each block runs forward and backward.
    """
    device = prepare(threads)
    from sas_megatron.benchmarks.attention import measure_attention, roofline_points
    from sas_megatron.benchmarks.attention_blocks import BlockShape
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
    machine = tables.machine_and_threads(device)
    result = {"shape": sizes, "precision": precision, "backend": backend, **result, **machine}
    if output is not None:
        tables.draw(roofline_points(result), output, result)
    tables.show(result, tables.attention_rows(result), as_json=as_json)


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
    """Time the simulation against the least possible time.

    The least time follows from the bytes and the FLOPs of the head and feature simulation.

    \f
    Raises:
        UserError: --sweep is used without a CUDA device.
    """
    device = prepare(threads)
    if sweep and device.type != "cuda":
        raise UserError("--sweep: the fused kernels need a CUDA device; leave it out")
    from sas_megatron.benchmarks.attention_blocks import BlockShape
    from sas_megatron.benchmarks.simulation import measure_simulation, roofline_points
    from sas_megatron.model.assembly import DTYPES

    shape, dtype = BlockShape(**sizes), DTYPES[precision]
    result = measure_simulation(shape, device=device, dtype=dtype, repeats=repeats)
    result = {"shape": sizes, "precision": precision, **result, **tables.machine_and_threads(device)}
    if sweep:
        from sas_megatron.benchmarks.tile_sweep import sweep_tiles

        result["sweep"] = sweep_tiles(shape, device=device, dtype=dtype, repeats=repeats)
    if output is not None:
        tables.draw(roofline_points(result), output, result)
    tables.show(result, tables.simulation_rows(result), as_json=as_json)


@bench.command()
@click.argument("base", type=click.Path())
@click.argument("other", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--microbatches", type=POSITIVE, default=2, show_default=True, help="Microbatches per step.")
@click.option("--rounds", type=POSITIVE, default=3, show_default=True)
@click.option("--transformers", "with_transformers", is_flag=True, help="Time BASE in transformers, too.")
@JSON_OPTION
def step(
    base: str, other: str, overrides: tuple[str, ...], microbatches: int, as_json: bool, **options: Any
) -> None:
    """Compare times and FLOPs of training steps of two configs.

    OTHER is compared with BASE, each with one model replica. Both get the OVERRIDES (section.field=value).
    With --transformers, the same rounds time a step of transformers' model with the parameters of BASE.
    """
    from sas_megatron.config.loading import load_run_config

    configs = {path: load_run_config(path, list(overrides)) for path in (base, other)}
    device = prepare(None)

    from sas_megatron.benchmarks.step_comparison import compare_steps, with_microbatches

    configs = {path: with_microbatches(config, microbatches) for path, config in configs.items()}
    result = compare_steps(configs, device=device, **options)
    if not as_json:
        click.echo(f"BASE: {base}\nOTHER: {other}")
    result |= tables.machine_and_threads(device)
    tables.show(result, tables.step_rows(result), as_json=as_json)


@bench.command()
@click.argument("config", type=click.Path(), default="configs/125m/mha.yaml")
@click.argument("overrides", nargs=-1)
@click.option(
    "--steps", type=POSITIVE, default=20, show_default=True, help="Steps after three warm-up steps."
)
@click.option(
    "--read-delay-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Compare steps with and without this many milliseconds added to each read of a sample instead.",
)
@click.option("--rounds", type=POSITIVE, default=9, show_default=True, help="Rounds of --read-delay-ms.")
@JSON_OPTION
def loop(
    config: str,
    overrides: tuple[str, ...],
    steps: int,
    read_delay_ms: float | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Time the training loop outside of the engine.

    The engine runs forward, backward and optimizer. OVERRIDES (section.field=value) apply to CONFIG. The run
    is a real one, on the built-in corpus.
    """
    import contextlib
    import sys
    import tempfile

    from sas_megatron.config.loading import load_run_config

    loaded = load_run_config(config, list(overrides))
    device = prepare(None)

    from sas_megatron.benchmarks.loop import measure_loop, prepare_run
    from sas_megatron.benchmarks.read_delay import count_steps, measure_read_delay
    from sas_megatron.distributed.topology import joined_topology

    with tempfile.TemporaryDirectory() as folder:
        num_steps = steps if read_delay_ms is None else count_steps(loaded, rounds=rounds)
        run = prepare_run(loaded, Path(folder), num_steps=num_steps)
        with (
            # The console lines of the run would mix with the result.
            contextlib.redirect_stdout(sys.stderr),
            joined_topology(run.parallel, device=device, seed=1, timeout_minutes=10) as topology,
        ):
            result = (
                measure_loop(run, topology)
                if read_delay_ms is None
                else measure_read_delay(run, topology, seconds=read_delay_ms / 1e3, rounds=rounds)
            )
    machine = tables.machine_and_threads(device)
    result = {"config": config, "overrides": overrides, **result, **machine}
    rows = tables.loop_rows(result) if read_delay_ms is None else tables.read_delay_rows(result)
    tables.show(result, rows, as_json=as_json)


@bench.command()
@click.option(
    "--tokenizer", "tokenizer_path", type=click.Path(path_type=Path), help="Default: train a tokenizer."
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="Parquet file with a column `text`; default: the built-in corpus.",
)
@click.option("--workers", type=POSITIVE, default=2, show_default=True, help="Processes of each program.")
@click.option("--repeats", type=POSITIVE, default=5, show_default=True)
@click.option(
    "--megatron-lm",
    type=click.Path(path_type=Path),
    help="Checkout of Megatron-LM, whose preprocessing script is then timed as well.",
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
    """Compare `data prepare` with the library of the tokenizer alone."""
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
    result = {**result, **tables.machine_and_date(describe_processor())}
    tables.show(result, tables.data_rows(result), as_json=as_json)


@bench.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path(),
    help="Directory on the disk to measure; default: the current one.",
)
@click.option(
    "--gigabytes",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the checkpoint in 10⁹ bytes; needs four times as much memory.",
)
@click.option("--repeats", type=POSITIVE, default=7, show_default=True)
@JSON_OPTION
def checkpoint(directory: Path, gigabytes: float, repeats: int, as_json: bool) -> None:
    """Time how long a save blocks training, and its rate.

    The time is compared with one copy in memory, the save with one without checksums, and the rate with dd.
    """
    import tempfile

    from sas_megatron.platform.device import prepare_device

    device = prepare_device()

    from sas_megatron.benchmarks.checkpointing import measure_checkpointing
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.config.shipped_configs import shipped_configs
    from sas_megatron.distributed.topology import joined_topology

    # The config of any run of one process is suitable. It configures the saver and is saved as well.
    config = load_run_config(shipped_configs() / "quickstart_mha.yaml", ["parallel.tensor=1"])
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix="bench_checkpoint_") as folder,
        joined_topology(config.parallel, device=device, seed=1, timeout_minutes=10) as topology,
    ):
        result = measure_checkpointing(Path(folder), config, topology, gigabytes=gigabytes, repeats=repeats)
    result = {**result, **tables.machine_and_threads(device)}
    tables.show(result, tables.checkpoint_rows(result), as_json=as_json)


@bench.command()
@click.option("--config", type=click.Path(), help="Config of the model that scores; default: quickstart_sas.")
@click.option(
    "--num-tokens", type=POSITIVE, default=40_000, show_default=True, help="Tokens of a measurement."
)
@click.option("--batch-tokens", type=POSITIVE, default=8192, show_default=True)
@THREADS_OPTION
@click.option("--repeats", type=POSITIVE, default=5, show_default=True, help=ROUNDS_HELP)
@JSON_OPTION
def scoring(
    config: str | None, num_tokens: int, batch_tokens: int, threads: int | None, repeats: int, as_json: bool
) -> None:
    """Compare the rate of scoring with bare forward passes.

    Passages are scored as in `evaluate`, by the same model.
    """
    device = prepare(threads)
    from sas_megatron.benchmarks.scoring import measure_scoring
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.config.shipped_configs import shipped_configs
    from sas_megatron.distributed.topology import joined_topology

    run = load_run_config(config or shipped_configs() / "quickstart_sas.yaml", ["parallel.tensor=1"])
    with joined_topology(run.parallel, device=device, seed=1, timeout_minutes=10) as topology:
        result = measure_scoring(
            run, topology, num_tokens=num_tokens, batch_tokens=batch_tokens, repeats=repeats
        )
    result = {**result, **tables.machine_and_threads(device)}
    tables.show(result, tables.scoring_rows(result), as_json=as_json)
