"""`sas-megatron evaluate`: held-out loss of a trained model, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sas_megatron.cli.data import document_limit
from sas_megatron.cli.log_setup import configure_logging

if TYPE_CHECKING:
    from sas_megatron.data.documents import Documents
    from sas_megatron.data.sources import SourceFile
    from sas_megatron.evaluation.model_source import ModelSource
    from sas_megatron.evaluation.settings import WindowSettings
    from sas_megatron.evaluation.tasks import LoadedTasks
    from sas_megatron.evaluation.trained_model import TrainedModel

# Timeout of collectives: the harness may download data while the other ranks wait.
TASK_TIMEOUT_MINUTES = 180.0

_KINDS = {"tasks": "--tasks", "files": "--files", "validation": "the loss on the validation windows"}
# The kinds of evaluation on which an option has an effect, for options that not all kinds use. (Validation
# windows do not overlap.)
_KINDS_OF_OPTION = {
    **dict.fromkeys(
        (
            "include_paths",
            "num_fewshot",
            "limit",
            "generation",
            "bootstrap_iterations",
            "confirm_run_unsafe_code",
            "cache",
        ),
        ("tasks",),
    ),
    **dict.fromkeys(("files", "text_column", "max_document_bytes", "stride"), ("files",)),
    "lengths": ("files", "validation"),
}


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--tasks", help="Tasks, groups or tags of lm-evaluation-harness, separated by commas; * matches any name."
)
@click.option(
    "--include-path",
    "include_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder of additional task files.",
)
@click.option(
    "--num-fewshot", type=int, help="Number of examples before each question; by default that of the task."
)
@click.option(
    "--limit", type=float, help="Number of documents per task, or a fraction below 1. For trial runs."
)
@click.option(
    "--generation",
    help="Replaces the generation options of tasks, for example max_gen_toks=64,temperature=0.8.",
)
@click.option(
    "--bootstrap-iterations",
    type=int,
    default=1000,
    show_default=True,
    help="Bootstrap resamplings for standard errors without a formula; 0 disables these errors.",
)
@click.option(
    "--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run code that the model generates."
)
@click.option("--cache", is_flag=True, help="Store the answers to tasks, and reuse stored answers.")
@click.option(
    "--files",
    multiple=True,
    metavar="[DOMAIN=]PATH",
    help="Documents whose loss is measured (Parquet, Arrow, JSON lines, text, or builtin).",
)
@click.option("--text-column", default="text", show_default=True, help="Column with the text.")
@document_limit
@click.option(
    "--sequence-length",
    "lengths",
    type=int,
    multiple=True,
    help="Window length in tokens; by default that of training. Repeat it to compare lengths.",
)
@click.option("--stride", type=int, help="Distance of windows in tokens; by default their length.")
@click.option("--iteration", type=int, help="Step of the checkpoint; by default the newest.")
@click.option("--batch-tokens", type=int, default=8192, show_default=True, help="Largest batch, in tokens.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the results; by default evaluation/ in the run directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def evaluate(
    context: click.Context, /, source: Path, overrides: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Evaluate the model of SOURCE, a run directory or a checkpoint, on all launched processes.

    Without --tasks or --files, measure the loss on the validation windows of the run, as in training.
    OVERRIDES have the form section.field=value and mostly select the layout, for example:

    torchrun --standalone --nproc-per-node 2 -m sas_megatron evaluate … parallel.tensor=2

    Results are written to summary.json. lm-evaluation-harness writes its files to the same folder.
    """
    from sas_megatron.platform.launcher import set_rank_from_slurm

    set_rank_from_slurm()
    configure_logging()
    from sas_megatron.evaluation.model_source import find_model_source

    _check_options(context)
    model_source = find_model_source(source, iteration=options["iteration"], overrides=overrides)
    from sas_megatron.evaluation.results import results_folder, write_results

    folder = results_folder(model_source, options.pop("output"))
    if options["tasks"] is not None:
        section, results = "tasks", _evaluate_tasks(model_source, folder=folder, **options)
    else:
        section, results = _measure_loss(model_source, folder=folder, **options)
    if results is None:  # This is not rank 0.
        return
    path = write_results(folder, model_source, section, results)
    if as_json:
        click.echo(json.dumps({section: results}, indent=2))
        return
    from sas_megatron.cli.evaluation_tables import show_held_out, show_tasks

    (show_tasks if section == "tasks" else show_held_out)(results)
    click.echo(f"Results: {path}")


def _check_options(context: click.Context) -> None:
    """Raise `FieldError` for an option that has no effect on the selected kind of evaluation."""
    from sas_megatron.config.errors import FieldError

    given = context.params
    kind = "tasks" if given["tasks"] is not None else "files" if given["files"] else "validation"
    for parameter in context.command.params:
        name = str(parameter.name)
        kinds = _KINDS_OF_OPTION.get(name, (kind,))
        if kind not in kinds and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            others = " or ".join(_KINDS[other] for other in kinds)
            raise FieldError(
                parameter.opts[-1],
                given[name],
                f"applies only to {others}, but this command evaluates {_KINDS[kind]}",
                "omit it, or run separate commands",
            )


def _evaluate_tasks(
    source: ModelSource,
    *,
    folder: Path,
    tasks: str,
    include_paths: tuple[Path, ...],
    num_fewshot: int | None,
    limit: float | None,
    generation: str | None,
    bootstrap_iterations: int,
    confirm_run_unsafe_code: bool,
    batch_tokens: int,
    cache: bool,
    **_others: Any,
) -> dict[str, Any] | None:
    from sas_megatron.evaluation.model_source import load_model
    from sas_megatron.evaluation.settings import TaskSettings

    settings = TaskSettings(
        names=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        num_fewshot=num_fewshot,
        limit=limit,
        generation=generation,
        bootstrap_iterations=bootstrap_iterations,
        runs_unsafe_code=confirm_run_unsafe_code,
        batch_tokens=batch_tokens,
    )
    loaded_tasks: list[LoadedTasks] = []

    def load() -> None:
        from sas_megatron.evaluation.results import check_results
        from sas_megatron.evaluation.task_options import check_options
        from sas_megatron.evaluation.tasks import load_tasks

        check_results(folder, source)
        unsafe = settings.runs_unsafe_code
        loaded_tasks.append(load_tasks(settings.names, include_paths, runs_unsafe_code=unsafe))
        check_options(loaded_tasks[0].by_name(), settings)

    with load_model(source, check_first=load, timeout_minutes=TASK_TIMEOUT_MINUTES) as model:
        from sas_megatron.evaluation.tasks import evaluate_tasks

        return evaluate_tasks(
            model,
            loaded_tasks[0] if loaded_tasks else None,
            settings,
            folder=folder,
            cache=folder / f"answers_{_fingerprint(source)}" if cache else None,
        )


def _fingerprint(source: ModelSource) -> str:
    """Return a digest of the config and checkpoint, which together with a request determine its answer."""
    # Paths may change: the manifest and the tokenizer identify the model.
    paths = {"prefixes", "tokenizer", "index_cache"}
    config = source.config.model_dump_json(exclude={"parallel": True, "logging": True, "data": paths})
    identity = f"{config}{source.manifest_sha256}{source.tokenizer.sha256}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _measure_loss(
    source: ModelSource,
    *,
    folder: Path,
    files: tuple[str, ...],
    text_column: str,
    max_document_bytes: int,
    lengths: tuple[int, ...],
    stride: int | None,
    batch_tokens: int,
    **_others: Any,
) -> tuple[str, dict[str, Any] | None]:
    from sas_megatron.data.documents import Documents
    from sas_megatron.evaluation.model_source import load_model
    from sas_megatron.evaluation.results import check_results
    from sas_megatron.evaluation.settings import WindowSettings

    trained = source.config.data.sequence_length
    settings = [
        WindowSettings(length, stride=length if stride is None else stride, batch_tokens=batch_tokens)
        for length in lengths or (trained,)
    ]
    paths = _find_files(files, text_column=text_column)
    # Before torch is imported.
    remarks = [] if files else _list_repetitions(source, settings)
    with load_model(source, check_first=functools.partial(check_results, folder, source)) as model:
        from sas_megatron.evaluation.sliding_window import measure_held_out

        documents = {
            name: Documents(found, text_column=text_column, max_document_bytes=max_document_bytes)
            for name, found in paths.items()
        }
        domains = _file_domains(model, documents) if files else _validation_domain(model)
        results = measure_held_out(model, domains, settings)
        remarks += [
            f"{name}: {of_domain.num_empty:,} empty documents were left out."
            for name, of_domain in documents.items()
            if of_domain.num_empty
        ]
        results["remarks"] = remarks
        return "files" if files else "validation", results if model.topology.is_rank0 else None


def _list_repetitions(source: ModelSource, settings: Sequence[WindowSettings]) -> list[str]:
    """Check the validation data for each window length, and return remarks on windows that repeat text.

    Raises:
        UserError: The validation data cannot be cut into such windows.
    """
    from sas_megatron.data.epochs import count_data_use
    from sas_megatron.evaluation.settings import windowed_config

    remarks = []
    for length in (of_length.length for of_length in settings):
        repetition = count_data_use(windowed_config(source.config, length)).describe_repeated_windows()
        if repetition is not None:
            remarks.append(f"Length {length:,}: {repetition}.")
    return remarks


def _find_files(files: tuple[str, ...], *, text_column: str) -> dict[str, list[SourceFile]]:
    """Return files by domain. A domain has the given name, or that of its file; it may have several paths.

    Raises:
        UserError: A file does not exist or has an unsupported type.
    """
    from sas_megatron.config.errors import FieldError
    from sas_megatron.data.corpus import resolve_sources
    from sas_megatron.data.sources import find_source_files

    paths_by_domain: dict[str, list[str]] = {}
    for given in files:
        # A path may contain "=", as in lang=en/part-0.jsonl.
        is_path = "=" not in given or os.path.exists(given)
        name, path = (Path(given).name, given) if is_path else given.split("=", 1)
        if not path:
            raise FieldError(
                "--files", f"{given!r}", "contains no path", "name one, or use . for the current folder"
            )
        paths_by_domain.setdefault(name, []).extend(resolve_sources([path]))
    return {
        name: find_source_files(paths, text_column=text_column) for name, paths in paths_by_domain.items()
    }


def _file_domains(model: TrainedModel, documents: Mapping[str, Documents]) -> dict[str, Any]:
    from sas_megatron.evaluation.sliding_window import document_windows

    def windows(of_domain: Documents, settings: WindowSettings) -> Any:
        return document_windows(of_domain, model.tokenizer, settings)

    return {name: functools.partial(windows, of_domain) for name, of_domain in documents.items()}


def _validation_domain(model: TrainedModel) -> dict[str, Any]:
    from sas_megatron.data.validation_sets import list_validation_sets
    from sas_megatron.evaluation.sliding_window import validation_windows

    def windows(name: str, settings: WindowSettings) -> Any:
        return validation_windows(model.config, model.tokenizer, length=settings.length, name=name)

    return {name: functools.partial(windows, name) for name in list_validation_sets(model.config)}
