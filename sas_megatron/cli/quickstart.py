"""`sas-megatron quickstart`: prepare data, train two attention variants on real text, and compare them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sas_megatron.config.shipped_configs import shipped_configs

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig


@click.command()
@click.argument("overrides", nargs=-1)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="Folder of data, runs and report. Existing files and finished runs are reused.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    default=shipped_configs() / "quickstart_mha.yaml",
    help="Config of the baseline.",
)
@click.option(
    "--candidate",
    type=click.Path(path_type=Path),
    default=shipped_configs() / "quickstart_sas.yaml",
    help="Config of the candidate.",
)
@click.option(
    "--corpus-bytes", type=int, default=None, help="Maximum number of bytes of the built-in corpus."
)
def quickstart(
    overrides: tuple[str, ...], directory: Path, baseline: Path, candidate: Path, corpus_bytes: int | None
) -> None:
    """Train multi-head attention and SAS on the same real text, and compare them.

    The text is the source code of Python's standard library on this machine. The candidate's MLP is narrowed
    until both models have the same number of parameters. OVERRIDES (section.field=value) apply to both runs.
    """
    start_time = time.perf_counter()
    configs = _build_configs(directory, [baseline, candidate], list(overrides))
    vocab_size = configs[0].model.vocab_size
    _prepare_data(directory / "data", vocab_size=vocab_size, corpus_bytes=corpus_bytes)
    for config in configs:
        _train(config)
    _report(configs, directory, seconds=time.perf_counter() - start_time)


def _log(text: str) -> None:
    click.echo(click.style(f"» {text}", bold=True))


def _build_configs(directory: Path, paths: list[Path], overrides: list[str]) -> list[RunConfig]:
    """Return both runs, on the quickstart's data and matched in their number of parameters."""
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.scaling.matching import MLP, match

    data = directory.absolute() / "data"
    common = [f"data.prefixes=['{data / 'python_source'}']", f"data.tokenizer='{data / 'tokenizer.model'}'"]
    configs = []
    for path in paths:
        name = path.stem.removeprefix("quickstart_")
        run_directory = f"logging.run_directory='{directory.absolute() / 'runs' / name}'"
        configs.append(load_run_config(path, [*common, run_directory, "checkpoint.resume=auto", *overrides]))
    baseline, candidate = configs
    return [baseline, match(baseline, candidate, axis="params", free=(MLP,)).config]


def _prepare_data(folder: Path, *, vocab_size: int, corpus_bytes: int | None) -> None:
    from sas_megatron.cli.data import show_progress
    from sas_megatron.config.errors import FieldError
    from sas_megatron.data.corpus import builtin_corpus
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.prepare import prepare_token_files
    from sas_megatron.data.tokenizer_loading import load_tokenizer
    from sas_megatron.data.tokenizer_training import train_tokenizer

    _log("text: the source code of the Python standard library")
    corpus = builtin_corpus(folder / "text", max_bytes=corpus_bytes)
    model = folder / "tokenizer.model"
    if not model.exists():
        _log(f"tokenizer: sentencepiece, {vocab_size:,} pieces")
        train_tokenizer(stream_documents([corpus]), vocab_size=vocab_size, model_path=model)
    if load_tokenizer(model).vocab_size != vocab_size:
        raise FieldError(
            "model.vocab_size",
            vocab_size,
            f"is not the vocabulary size of {model}, which an earlier quickstart trained",
            "choose another --directory",
        )
    with show_progress() as report_progress:
        preparation = prepare_token_files(
            [corpus], tokenizer_path=model, prefix=folder / "python_source", report_progress=report_progress
        )
    manifest = preparation.manifest
    _log(
        f"tokens: {manifest.num_tokens:,} from {manifest.num_documents:,} files, "
        f"{manifest.text_bytes / manifest.num_tokens:.2f} bytes per token"
    )


def _train(config: RunConfig) -> None:
    """Train one config with torchrun on this machine, unless a run of the same config has finished."""
    from sas_megatron.config.errors import FieldError
    from sas_megatron.config.loading import dump_yaml, find_differences, load_run_config
    from sas_megatron.costs.parameters import count_parameters
    from sas_megatron.io.files import save_file
    from sas_megatron.platform.local_machine import training_command, training_environment
    from sas_megatron.scaling.runs import has_finished
    from sas_megatron.training.entry import check_run

    run_directory = Path(config.logging.run_directory)
    resolved = run_directory / "config.yaml"
    ignored = ("checkpoint.resume",)  # earlier versions wrote another value
    if resolved.exists() and find_differences([load_run_config(resolved), config], ignored=ignored):
        raise FieldError(
            "--directory",
            run_directory.parents[1],
            f"holds a run of another config ({resolved})",
            "choose another --directory, or remove that run",
        )
    if has_finished(run_directory):
        _log(f"{run_directory.name}: already trained")
        return
    ranks = config.parallel.model_size
    check_run(config, world_size=ranks)
    parameters = sum(count_parameters(config).values())
    _log(
        f"{run_directory.name}: {parameters:,} parameters, {config.training.num_steps} steps, "
        f"tensor parallel over {ranks} processes"
    )
    save_file(resolved, dump_yaml(config), remedy="choose another --directory")
    command, environment = training_command(resolved, ranks=ranks), training_environment(ranks=ranks)
    if subprocess.run(command, env=environment).returncode:
        raise click.exceptions.Exit(1)


def _report(configs: list[RunConfig], directory: Path, *, seconds: float) -> None:
    from sas_megatron.scaling.report import write_report
    from sas_megatron.scaling.run_comparison import compare_runs
    from sas_megatron.scaling.run_report import FILES, build_run_report, print_comparison
    from sas_megatron.scaling.runs import load_run

    runs = [load_run(config.logging.run_directory) for config in configs]
    comparison = compare_runs(runs)
    page = write_report(build_run_report(runs, comparison), directory, FILES)
    print_comparison(comparison.rows)
    for text in (*(verdict.text for verdict in comparison.verdicts), *comparison.remarks):
        click.echo(f"· {text}")
    _log(
        f"finished in {seconds / 60:.1f} minutes; the comparison is in {page} and {page.with_suffix('.png')}"
    )
