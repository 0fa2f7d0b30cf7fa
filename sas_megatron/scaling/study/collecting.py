"""Collect the run directories of a study into its table, after checking that the runs are comparable."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import find_differences
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.data.epochs import describe_repetition
from sas_megatron.scaling.numbers import format_some
from sas_megatron.scaling.runs import Run, has_finished, load_run
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.run_states import IGNORED_FIELDS, find_dependency, has_diverged
from sas_megatron.scaling.study.step_times import describe_step_times, read_step_times
from sas_megatron.scaling.study.study_table import Row, StudyTable
from sas_megatron.scaling.study.sweeps import list_sweep_remarks, list_sweep_runs
from sas_megatron.training.data_identity import corpus_contents, remove_equal_data

# Fields of run.json that must be equal in all runs, or their losses are not comparable.
EQUAL_FIELDS = ("corpus", "numerics", "world_size")
# The packages that compute losses. Another machine may have other versions of the rest, which is stated.
NUMERICAL_PACKAGES = ("torch", "megatron-core")
NAMES = {"numerics": "packages"}


def collect(plan: Plan) -> StudyTable:
    """Return a table with one row per result of the plan, read from the run directories.

    Raises:
        UserError: No run has finished, a run differs from its plan, or runs differ in a field that the study
            does not vary; the message lists the differences.
    """
    found = {run.name: load_run(run.directory) for run in plan.results if has_finished(run.directory)}
    if not found:
        raise UserError(
            f"{plan.study.directory}: none of the study's {len(plan.results)} runs has finished; "
            "run `sas-megatron study run` first, or name the directory of the study with --directory"
        )
    _check_configs(plan, found)
    _check_equal(list(found.values()))
    step_times = read_step_times(plan)
    status = _list_statuses(plan, done=set(found))
    rows = tuple(
        _build_row(
            run,
            found.get(run.name),
            study=plan.directory.name,
            status=status[run.name],
            step_rounds=step_times.get(run.cell.name, []),
        )
        for run in plan.results
    )
    return StudyTable(
        name=plan.directory.name,
        baseline=plan.study.baseline,
        rows=rows,
        collected_at=datetime.now(UTC).isoformat(timespec="seconds"),
        remarks=_list_remarks(plan, rows, list(found.values())),
        sweeps=list_sweep_runs(plan),
        withdrawn=dict(plan.study.withdrawn),
    )


def _list_statuses(plan: Plan, *, done: set[str]) -> dict[str, str]:
    """Return the status of each result; a branch whose trunk diverged before the branch point diverged."""
    diverged = {run.name for run in plan.runs if has_diverged(run)}
    statuses = {}
    for run in plan.results:
        is_blocked = run.trunk in diverged and find_dependency(run) is not None
        unfinished = "diverged" if run.name in diverged or is_blocked else "missing"
        statuses[run.name] = "done" if run.name in done else unfinished
    return statuses


def _check_configs(plan: Plan, found: dict[str, Run]) -> None:
    lines = [
        f"  {run.name}: {field} is {actual}, planned {planned}"
        for run in plan.results
        if run.name in found
        for field, (planned, actual) in remove_equal_data(
            find_differences([run.config, found[run.name].config], ignored=IGNORED_FIELDS),
            run.config,
            run.directory,
        ).items()
    ]
    if lines:
        raise UserError(
            "these runs differ from the plan of the study; remove their directories and run them again, or "
            "restore the study file:\n" + "\n".join(lines[:20]) + _count_more(lines)
        )


def _check_equal(runs: Sequence[Run]) -> None:
    lines = []
    for field in EQUAL_FIELDS:
        groups = _group_by(runs, field)
        if len(groups) > 1:
            lines += [
                f"  run.json {NAMES.get(field, field)}: {value} in {format_some(names)}"
                for value, names in groups.items()
            ]
    if lines:
        raise UserError(
            "these runs differ in fields that the study does not vary; run the smaller group again:\n"
            + "\n".join(lines)
        )


def _list_remarks(plan: Plan, rows: Sequence[Row], runs: Sequence[Run]) -> tuple[str, ...]:
    remarks = [*list_sweep_remarks(plan.study), *describe_step_times(plan)]
    remarks += [remark for run in runs for remark in run.remarks]
    for status in ("missing", "diverged"):
        names = [row.run for row in rows if row.status == status]
        if names:
            remarks.append(f"{len(names)} of {len(rows)} runs are {status}: {format_some(names)}.")
    remarks += describe_repetition({row.run: row.epochs for row in rows})
    for field, name, effect in (
        ("machine", "machines", "their times are not comparable"),
        ("git", "git revisions", "the package changed during the study"),
        ("packages", "versions of packages", "two machines may differ in more than their speed"),
    ):
        groups = _group_by(runs, field)
        if len(groups) > 1:
            values = "; ".join(f"{value} in {format_some(names)}" for value, names in groups.items())
            remarks.append(f"The runs have different {name}, so {effect}: {values}.")
    return tuple(remarks)


def _build_row(
    planned: PlannedRun, run: Run | None, *, study: str, status: str, step_rounds: list[float]
) -> Row:
    config, cell = planned.config, planned.cell
    flops_per_token = {name: float(count) for name, count in count_training_flops(config).items()}
    counted = Row(
        run=planned.name,
        study=study,
        status=status,
        variant=cell.variant,
        attention=config.attention.kind,
        size=cell.size,
        levels=dict(cell.levels),
        seed=planned.seed,
        budget=float(planned.budget),
        sequence_length=config.data.sequence_length,
        params=cell.parameters,
        params_without_embeddings=cell.parameters_without_embeddings,
        tokens=planned.tokens,
        steps=config.training.num_steps,
        training_flops=planned.tokens * sum(flops_per_token.values()),
        flops_6nd=6.0 * cell.parameters * planned.tokens,
        flops_per_token=flops_per_token,
        learning_rate=config.optimizer.learning_rate,
        global_batch_size=config.training.global_batch_size,
        schedule=config.schedule.kind,
        trunk=planned.trunk,
        step_seconds=statistics.median(step_rounds) if step_rounds else None,
        step_rounds=step_rounds,
    )
    return counted if run is None else _add_measurements(counted, planned, run)


def _add_measurements(counted: Row, planned: PlannedRun, run: Run) -> Row:
    summary = run.summary
    curve = [point for point in run.validation_curve if point.loss is not None]
    provenance = (planned.directory / "run.json").read_bytes()
    return Row(
        **{
            **vars(counted),
            "epochs": summary.epochs,
            "loss": summary.final_validation_loss,
            "train_loss": summary.final_train_loss,
            "bits_per_byte": summary.validation_bits_per_byte,
            "set_losses": {name: found.loss for name, found in (summary.validation_sets or {}).items()},
            "training_seconds": summary.training_seconds,
            "median_step_seconds": summary.median_step_seconds,
            "peak_memory_bytes": summary.peak_memory_bytes,
            "world_size": summary.world_size,
            "machine": _text(run.provenance.get("machine")),
            "git": _text(run.provenance.get("git")),
            "host": _text(run.provenance.get("host")),
            "corpus_sha256": _hash_corpus(run),
            "provenance_sha256": hashlib.sha256(provenance).hexdigest(),
            "curve_steps": [point.step for point in curve],
            "curve_tokens": [point.consumed_tokens for point in curve],
            "curve_flops": [point.training_flops for point in curve],
            "curve_seconds": [point.elapsed_seconds for point in curve],
            "curve_loss": [point.loss for point in curve],
            "layer_steps": run.measurements.steps,
            "layer_curves": run.measurements.curves,
            "layer_values": run.measurements.layers,
        }
    )


def _hash_corpus(run: Run) -> str | None:
    corpus = _text(corpus_contents(run.provenance))
    return None if corpus is None else hashlib.sha256(corpus.encode()).hexdigest()


def _group_by(runs: Sequence[Run], field: str) -> dict[str | None, list[str]]:
    groups: dict[str | None, list[str]] = {}
    for run in runs:
        groups.setdefault(_text(_find_value(run, field)), []).append(run.name)
    return groups


def _find_value(run: Run, field: str) -> object:
    """Return a field of run.json; `numerics` are the versions of the packages that compute losses."""
    if field == "corpus":
        return corpus_contents(run.provenance)
    if field == "numerics":
        packages = run.provenance.get("packages")
        return (
            {name: packages.get(name) for name in NUMERICAL_PACKAGES} if isinstance(packages, dict) else None
        )
    value: object = run.provenance.get(field)
    return value


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True)


def _count_more(lines: Sequence[str]) -> str:
    return f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
