"""`sas-megatron bench`: measurements of this machine, as ratios within one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure attention and tokenization on this machine."""


@bench.command()
@click.option("--num-heads", type=int, default=12, show_default=True)
@click.option("--head-expansion", type=int, default=3, show_default=True)
@click.option("--head-dim", type=int, default=64, show_default=True)
@click.option("--simulated-head-dim", type=int, default=96, show_default=True)
@click.option("--kernel-size", type=int, default=3, show_default=True)
@click.option("--sequence-length", type=int, default=512, show_default=True)
@click.option("--batch-size", type=int, default=2, show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", type=int, default=None, help="CPU threads; by default one a processor.")
@click.option("--repeats", type=int, default=9, show_default=True, help="Rounds, after two that warm up.")
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
def attention(precision: str, threads: int | None, repeats: int, as_json: bool, **shape: int) -> None:
    """Time the SAS block, forward and backward, against its literal form and against multi-head."""
    import os

    from sas_megatron.platform.device import describe_machine, prepare_device

    device = prepare_device()

    import torch

    from sas_megatron.benchmarks.attention import BlockShape, measure_attention
    from sas_megatron.config.parallel import ParallelConfig
    from sas_megatron.model.assembly import DTYPES
    from sas_megatron.parallel.topology import joined_topology

    torch.set_num_threads(threads or os.cpu_count() or 1)
    with joined_topology(ParallelConfig(), device=device, seed=1, timeout_minutes=1) as topology:
        result = measure_attention(BlockShape(**shape), topology, dtype=DTYPES[precision], repeats=repeats)
    facts = {"shape": shape, "precision": precision, "threads": torch.get_num_threads()}
    _show(
        {**facts, **result, **_place(describe_machine(device))},
        as_json,
        [
            ("SAS block", f"{result['seconds']['sas'] * 1e3:.1f} ms"),
            ("literal modules", f"{result['seconds']['literal'] * 1e3:.1f} ms"),
            ("multi-head block", f"{result['seconds']['multi_head'] * 1e3:.1f} ms"),
            ("literal / SAS", f"{result['literal_over_sas']:.2f}"),
            ("SAS / multi-head", f"{result['sas_over_multi_head']:.2f}"),
        ],
    )


@bench.command()
@click.option(
    "--tokenizer", "tokenizer_path", type=click.Path(path_type=Path), help="By default one is trained."
)
@click.option(
    "--source", type=click.Path(path_type=Path), help="Parquet file with a column text; by default builtin."
)
@click.option("--workers", type=int, default=2, show_default=True)
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
def tokenization(
    tokenizer_path: Path | None, source: Path | None, workers: int, repeats: int, as_json: bool
) -> None:
    """Speed of `data prepare` against as many concurrent processes of sentencepiece alone."""
    import tempfile

    from sas_megatron.benchmarks.tokenization import measure_tokenization
    from sas_megatron.data.corpus import builtin_corpus
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.tokenizer_training import train_tokenizer

    source = source or builtin_corpus()
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer_path is None:
            tokenizer_path = Path(folder) / "tokenizer.model"
            train_tokenizer(stream_documents([source]), vocab_size=8192, model_path=tokenizer_path)
        result = measure_tokenization(source, tokenizer_path, workers=workers, repeats=repeats)

    from sas_megatron.platform.machine import describe_processor

    _show(
        {**result, **_place(describe_processor())},
        as_json,
        [
            ("data prepare", f"{result['prepare_tokens_per_second']:,.0f} tokens/s"),
            (f"{workers} bare processes", f"{result['bare_tokens_per_second']:,.0f} tokens/s"),
            ("ratio", f"{result['ratio']:.2f}"),
            ("peak memory", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
            ("of a corpus three times as long", f"{result['peak_memory_bytes_of_triple'] / 2**20:.0f} MiB"),
        ],
    )


@bench.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path(),
    help="On the disk to measure; default: here.",
)
@click.option(
    "--gigabytes", type=float, default=1.0, show_default=True, help="10⁹ bytes, in memory four times."
)
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
def checkpoint(directory: Path, gigabytes: float, repeats: int, as_json: bool) -> None:
    """Time that saving takes from training, and its rate, against one copy in memory and against dd."""
    import tempfile

    from sas_megatron.platform.device import describe_machine, prepare_device

    device = prepare_device()

    from sas_megatron.benchmarks.checkpointing import measure_checkpointing
    from sas_megatron.cli.quickstart import CONFIGS
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.parallel.topology import joined_topology

    # Any run of one process: it says how to save, and is written into the checkpoint.
    config = load_run_config(CONFIGS / "quickstart_mha.yaml", ["parallel.tensor=1"])
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix="bench_checkpoint_") as folder,
        joined_topology(config.parallel, device=device, seed=1, timeout_minutes=10) as topology,
    ):
        result = measure_checkpointing(Path(folder), config, topology, gigabytes=gigabytes, repeats=repeats)
    seconds = result["seconds"]
    _show(
        {**result, **_place(describe_machine(device))},
        as_json,
        [
            ("one copy in memory", f"{seconds['copy']:.3f} s"),
            ("blocked by an asynchronous save", f"{seconds['blocked']:.3f} s"),
            ("blocked / copy", f"{result['blocked_over_copy']:.2f}"),
            ("save, checksums included", f"{seconds['save']:.3f} s"),
            ("dd conv=fsync", f"{seconds['dd']:.3f} s"),
            ("rate of a save / of dd", f"{result['save_rate_over_dd']:.2f}"),
        ],
    )


@bench.command()
@click.option("--config", type=click.Path(), help="A run's, whose model scores; by default quickstart_sas.")
@click.option("--num-tokens", type=int, default=40_000, show_default=True, help="Of a measurement.")
@click.option("--batch-tokens", type=int, default=8192, show_default=True)
@click.option("--threads", type=int, default=None, help="CPU threads; by default one a processor.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Rounds, after one that warms up.")
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the table.")
def scoring(
    config: str | None, num_tokens: int, batch_tokens: int, threads: int | None, repeats: int, as_json: bool
) -> None:
    """Rate of scoring passages, as `evaluate` does, against the bare forward pass of the same model."""
    import os

    from sas_megatron.platform.device import describe_machine, prepare_device

    device = prepare_device()

    import torch

    from sas_megatron.benchmarks.scoring import measure_scoring
    from sas_megatron.cli.quickstart import CONFIGS
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.parallel.topology import joined_topology

    torch.set_num_threads(threads or os.cpu_count() or 1)
    run = load_run_config(config or CONFIGS / "quickstart_sas.yaml", ["parallel.tensor=1"])
    with joined_topology(run.parallel, device=device, seed=1, timeout_minutes=10) as topology:
        result = measure_scoring(
            run, topology, num_tokens=num_tokens, batch_tokens=batch_tokens, repeats=repeats
        )
    _show(
        {**result, "threads": torch.get_num_threads(), **_place(describe_machine(device))},
        as_json,
        [
            (f"{kind}, {name}", f"{result[kind][name]:.2f}" if name == "ratio" else f"{rate:,.0f} tokens/s")
            for kind in ("choices", "texts")
            for name, rate in result[kind].items()
        ],
    )


def _place(machine: dict[str, object]) -> dict[str, Any]:
    import datetime

    return {"machine": machine, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _show(result: dict[str, Any], as_json: bool, rows: list[tuple[str, str]]) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['machine'].get('gpu') or result['machine']['processor']}, {result['date']}")
    table.add_column("measure")
    table.add_column("median", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
