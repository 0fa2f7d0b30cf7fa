"""`sas-megatron quickstart`: from nothing to a comparison of two attentions on real text."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sas_megatron.config.run import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@click.command()
@click.argument("overrides", nargs=-1)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="Everything goes here; what is there already is not made again.",
)
@click.option("--baseline", type=click.Path(path_type=Path), default=CONFIGS / "quickstart_mha.yaml")
@click.option("--candidate", type=click.Path(path_type=Path), default=CONFIGS / "quickstart_sas.yaml")
@click.option("--corpus-bytes", type=int, default=None, help="Take only so much of the built-in corpus.")
def quickstart(
    overrides: tuple[str, ...], directory: Path, baseline: Path, candidate: Path, corpus_bytes: int | None
) -> None:
    """Train multi-head attention and SAS side by side on real text, and compare them.

    The text is the source of this machine's Python standard library. The candidate's MLP is narrowed
    until both have the same number of parameters. OVERRIDES (section.field=value) apply to both.
    """
    started = time.perf_counter()
    configs = _build_configs(directory, [baseline, candidate], list(overrides))
    vocab_size = configs[0].model.vocab_size
    _prepare_data(directory / "data", vocab_size=vocab_size, corpus_bytes=corpus_bytes)
    for config in configs:
        _train(config)
    _report(configs, directory, seconds=time.perf_counter() - started)


def _say(text: str) -> None:
    click.echo(click.style(f"» {text}", bold=True))


def _build_configs(directory: Path, paths: list[Path], overrides: list[str]) -> list[RunConfig]:
    """Both runs on the quickstart's data; the second matched to the first in parameters."""
    from sas_megatron.config.loading import load_run_config
    from sas_megatron.scaling.matching import MLP, match

    data = directory.absolute() / "data"
    common = [f"data.prefixes=['{data / 'python_source'}']", f"data.tokenizer='{data / 'tokenizer.model'}'"]
    configs = []
    for path in paths:
        name = path.stem.removeprefix("quickstart_")
        place = f"logging.run_directory='{directory.absolute() / 'runs' / name}'"
        configs.append(load_run_config(path, [*common, place, "checkpoint.resume=true", *overrides]))
    baseline, candidate = configs
    return [baseline, match(baseline, candidate, axis="params", free=(MLP,)).config]


def _prepare_data(folder: Path, *, vocab_size: int, corpus_bytes: int | None) -> None:
    from sas_megatron.config.errors import FieldError
    from sas_megatron.data.corpus import builtin_corpus
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.prepare import prepare_token_files
    from sas_megatron.data.progress import show_progress
    from sas_megatron.data.tokenizer import Tokenizer
    from sas_megatron.data.tokenizer_training import train_tokenizer

    _say("text: the source of the Python standard library")
    corpus = builtin_corpus(folder / "text", max_bytes=corpus_bytes)
    model = folder / "tokenizer.model"
    if not model.exists():
        _say(f"tokenizer: sentencepiece, {vocab_size:,} pieces")
        train_tokenizer(stream_documents([corpus]), vocab_size=vocab_size, model_path=model)
    if Tokenizer(model).vocab_size != vocab_size:
        raise FieldError(
            "model.vocab_size",
            vocab_size,
            f"is not that of {model}, which an earlier quickstart left",
            "choose another --directory",
        )
    with show_progress() as report_progress:
        preparation = prepare_token_files(
            [corpus], tokenizer_path=model, prefix=folder / "python_source", report_progress=report_progress
        )
    manifest = preparation.manifest
    _say(
        f"tokens: {manifest.num_tokens:,} from {manifest.num_documents:,} files, "
        f"{manifest.text_bytes / manifest.num_tokens:.2f} bytes each"
    )


def _train(config: RunConfig) -> None:
    """Runs one config by torchrun on this machine; a finished run of the same config is kept."""
    from sas_megatron.config.errors import FieldError
    from sas_megatron.config.loading import dump_yaml, load_run_config
    from sas_megatron.costs.model_costs import count_parameters
    from sas_megatron.data.writing import write_file
    from sas_megatron.platform.local_launch import training_command, training_environment
    from sas_megatron.scaling.runs import has_finished
    from sas_megatron.training.start import check

    run_directory = Path(config.logging.run_directory)
    resolved = run_directory / "config.yaml"
    if resolved.exists() and load_run_config(resolved) != config:
        raise FieldError(
            "--directory",
            run_directory.parents[1],
            f"holds a run of another config ({resolved})",
            "choose another directory, or remove that one",
        )
    if has_finished(run_directory):
        _say(f"{run_directory.name}: trained already")
        return
    ranks = config.parallel.model_size
    check(config, world_size=ranks)
    parameters = sum(count_parameters(config).values())
    _say(
        f"{run_directory.name}: {parameters:,} parameters, {config.training.num_steps} steps, "
        f"tensor parallel over {ranks} processes"
    )
    run_directory.mkdir(parents=True, exist_ok=True)
    write_file(resolved, dump_yaml(config))
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
    _say(f"done in {seconds / 60:.1f} minutes; see {page} and {page.with_suffix('.png')}")
