"""`sas-megatron evaluate`: held-out loss of a trained model, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sas_megatron.cli.log_setup import configure_logging

if TYPE_CHECKING:
    from sas_megatron.evaluation.start import FoundModel
    from sas_megatron.evaluation.tasks import LoadedTasks
    from sas_megatron.evaluation.trained_model import TrainedModel

# The harness may fetch data while the other ranks wait for it.
WAIT_FOR_TASKS_MINUTES = 180.0

_KINDS = {"tasks": "--tasks", "files": "--files", "validation": "the loss on validation windows"}
# Options that concern some kinds of evaluation only. (Validation windows are cut side by side.)
_CONCERNS = {
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
    **dict.fromkeys(("files", "text_column", "stride"), ("files",)),
    "lengths": ("files", "validation"),
}


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--tasks", help="Tasks, groups and tags of lm-evaluation-harness, by comma; * stands for any.")
@click.option(
    "--include-path",
    "include_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder of task files of your own.",
)
@click.option("--num-fewshot", type=int, help="Examples before each question; by default as the task says.")
@click.option("--limit", type=float, help="Documents of each task, or a share below 1; for trying.")
@click.option(
    "--generation", help="In place of what tasks say: max_gen_toks=64,temperature=0.8 and the like."
)
@click.option(
    "--bootstrap-iterations",
    type=int,
    default=1000,
    show_default=True,
    help="For standard errors without a formula; 0 leaves them out.",
)
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run what the model writes.")
@click.option("--cache", is_flag=True, help="Keep the answers to tasks, and take those of earlier runs.")
@click.option(
    "--files",
    multiple=True,
    metavar="[DOMAIN=]PATH",
    help="Documents whose loss is measured whole (Parquet, Arrow, JSON lines, text, or builtin).",
)
@click.option("--text-column", default="text", show_default=True, help="Column that holds the text.")
@click.option(
    "--sequence-length",
    "lengths",
    type=int,
    multiple=True,
    help="Tokens of a window, as often as lengths are to be compared; by default that of training.",
)
@click.option("--stride", type=int, help="Tokens from window to window; by default its length.")
@click.option("--iteration", type=int, help="The checkpoint after so many steps; by default the newest.")
@click.option("--batch-tokens", type=int, default=8192, show_default=True, help="Tokens of a batch at most.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the results; by default evaluation/ in the run's directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the tables.")
@click.pass_context
def evaluate(
    context: click.Context, /, source: Path, overrides: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Measure the model of SOURCE, a run's directory or a checkpoint, on the processes that are launched.

    Without --tasks or --files: the loss on the run's own validation windows, as training measures it.
    OVERRIDES read section.field=value, mostly the layout: torchrun --standalone --nproc-per-node 2 -m
    sas_megatron evaluate … parallel.tensor=2. Results go to summary.json, and those of the harness also to
    its own files beside it.
    """
    from sas_megatron.platform.launcher import set_rank_from_slurm

    set_rank_from_slurm()
    configure_logging()
    from sas_megatron.evaluation.start import find_model

    _check_fit(context)
    found = find_model(source, iteration=options["iteration"], overrides=overrides)
    from sas_megatron.evaluation.results import results_folder, write_results

    folder = results_folder(found, options.pop("output"))
    if options["tasks"] is not None:
        section, results = "tasks", _evaluate_tasks(found, folder=folder, **options)
    else:
        section, results = _measure_loss(found, folder=folder, **options)
    if results is None:  # not rank 0
        return
    path = write_results(folder, found, section, results)
    if as_json:
        click.echo(json.dumps({section: results}, indent=2))
        return
    from sas_megatron.cli.evaluation_tables import show_held_out, show_tasks

    (show_tasks if section == "tasks" else show_held_out)(results)
    click.echo(f"written to {path}")


def _check_fit(context: click.Context) -> None:
    """Raises `FieldError` for an option that would have no effect beside the others."""
    from sas_megatron.config.errors import FieldError

    given = context.params
    kind = "tasks" if given["tasks"] is not None else "files" if given["files"] else "validation"
    for parameter in context.command.params:
        name = str(parameter.name)
        kinds = _CONCERNS.get(name, (kind,))
        if kind not in kinds and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            others = " or ".join(_KINDS[other] for other in kinds)
            raise FieldError(
                parameter.opts[-1],
                given[name],
                f"concerns {others}, and what is asked for is {_KINDS[kind]}",
                "leave it out, or ask for one after the other",
            )


def _evaluate_tasks(
    found: FoundModel,
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
    from sas_megatron.evaluation.start import loaded
    from sas_megatron.evaluation.task_settings import TaskSettings

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
        from sas_megatron.evaluation.tasks import load_tasks

        check_results(folder, found)
        unsafe = settings.runs_unsafe_code
        loaded_tasks.append(load_tasks(settings.names, include_paths, runs_unsafe_code=unsafe))

    with loaded(found, check_first=load, timeout_minutes=WAIT_FOR_TASKS_MINUTES) as model:
        from sas_megatron.evaluation.tasks import evaluate_tasks

        return evaluate_tasks(
            model,
            loaded_tasks[0] if loaded_tasks else None,
            settings,
            folder=folder,
            cache=folder / f"answers_{_fingerprint(found)}" if cache else None,
        )


def _fingerprint(found: FoundModel) -> str:
    """Of what decides a checkpoint's answers beside the question."""
    config = found.config.model_dump_json(exclude={"parallel", "logging"})
    return hashlib.sha256(f"{config}{found.manifest_sha256}".encode()).hexdigest()[:12]


def _measure_loss(
    found: FoundModel,
    *,
    folder: Path,
    files: tuple[str, ...],
    text_column: str,
    lengths: tuple[int, ...],
    stride: int | None,
    batch_tokens: int,
    **_others: Any,
) -> tuple[str, dict[str, Any] | None]:
    from sas_megatron.evaluation.results import check_results
    from sas_megatron.evaluation.start import loaded
    from sas_megatron.evaluation.window_settings import WindowSettings

    trained = found.config.data.sequence_length
    settings = [
        WindowSettings(length, stride=stride or length, batch_tokens=batch_tokens)
        for length in lengths or (trained,)
    ]
    sources = _find_files(files)
    with loaded(found, check_first=functools.partial(check_results, folder, found)) as model:
        from sas_megatron.evaluation.held_out_table import measure_held_out

        domains = _file_domains(model, sources, text_column) if files else _validation_domain(model)
        results = measure_held_out(model, domains, settings)
        return "files" if files else "validation", results if model.topology.is_rank0 else None


def _find_files(files: tuple[str, ...]) -> dict[str, list[str]]:
    """Paths by the names that are given, or by their own; a name may have several paths.

    Raises:
        UserError: there is no such file, or none that can be read.
    """
    from sas_megatron.config.errors import FieldError
    from sas_megatron.data.corpus import resolve_sources
    from sas_megatron.data.sources import find_source_files

    sources: dict[str, list[str]] = {}
    for given in files:
        name, equals, path = given.partition("=")
        path = path if equals else given
        if not path:
            raise FieldError("--files", f"{given!r}", "names no path", "give one, or . for this folder")
        sources.setdefault(name if equals else Path(path).name, []).extend(resolve_sources([path]))
    for paths in sources.values():
        find_source_files(paths)
    return sources


def _file_domains(model: TrainedModel, sources: dict[str, list[str]], text_column: str) -> dict[str, Any]:
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.evaluation.sliding_window import document_windows
    from sas_megatron.evaluation.window_settings import WindowSettings

    def windows(paths: list[str], settings: WindowSettings) -> Any:
        documents = stream_documents(paths, text_column=text_column)
        return document_windows(documents, model.tokenizer, settings)

    return {name: functools.partial(windows, paths) for name, paths in sources.items()}


def _validation_domain(model: TrainedModel) -> dict[str, Any]:
    from sas_megatron.evaluation.sliding_window import validation_windows

    return {
        "validation": lambda settings: validation_windows(
            model.config, model.tokenizer, length=settings.length
        )
    }
