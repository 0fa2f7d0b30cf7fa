"""Merge the tables of several studies with the same baseline into one, for one report.

The studies may differ in variants, sizes, budgets and seeds. A variant at a size must be the same model in
all of them, and must read the same data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sas_megatron.config.errors import UserError
from sas_megatron.scaling.study.study_table import Row, StudyTable

# Fields that are equal in all rows of a variant, size and level.
_MODEL_FIELDS = ("attention", "params", "flops_per_token", "sequence_length", "global_batch_size")


def merge_tables(tables: Sequence[StudyTable]) -> StudyTable:
    """Return one table with the rows of all; a single table is returned as it is.

    Step times are kept if they were measured together (`study time` with all study files).

    Raises:
        UserError: The baselines differ, a variant at a size is not the same model, or two runs are equal in
            variant, size, budget and seed.
    """
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for table in tables[1:]:
        if table.baseline != first.baseline:
            raise UserError(
                f"the baseline of {table.name} is {table.baseline}, and that of {first.name} is "
                f"{first.baseline}; report on them separately"
            )
    _check_corpus(tables)
    models: dict[tuple[str, ...], tuple[str, Row]] = {}
    runs: dict[tuple[object, ...], str] = {}
    times: dict[tuple[str, ...], list[float]] = {}
    differing: set[str] = set()
    for table in tables:
        for row in table.rows:
            cell = (row.variant, row.size, *row.levels.values())
            _check_model(row, table.name, *models.setdefault(cell, (table.name, row)))
            key = (*cell, f"{row.budget:g}", row.seed)
            if key in runs:
                raise UserError(
                    f"{row.run} is a run of both {runs[key]} and {table.name}; remove it from one study"
                )
            runs[key] = table.name
            if times.setdefault(cell, row.step_rounds) != row.step_rounds:
                differing.add(f"{row.variant}-{row.size}")
    rows = [row for table in tables for row in table.rows]
    remarks = list(dict.fromkeys(f"{table.name}: {remark}" for table in tables for remark in table.remarks))
    if differing:
        rows = [dataclasses.replace(row, step_seconds=None, step_rounds=[]) for row in rows]
        remarks.append(
            f"The step times of {', '.join(sorted(differing))} were measured more than once: the time axis "
            "uses the training time of each run. Run `sas-megatron study time` with all study files."
        )
    return StudyTable(
        name=", ".join(table.name for table in tables),
        baseline=first.baseline,
        rows=tuple(rows),
        collected_at=max(table.collected_at for table in tables),
        remarks=tuple(remarks),
        sweeps=tuple(run for table in tables for run in table.sweeps),
        withdrawn={name: reason for table in tables for name, reason in table.withdrawn.items()},
    )


def _check_corpus(tables: Sequence[StudyTable]) -> None:
    """Check that the runs of all tables read the same data, as far as it is recorded.

    Raises:
        UserError: They do not.
    """
    studies: dict[str, str] = {}
    for table in tables:
        for corpus in {row.corpus_sha256 for row in table.rows} - {None}:
            studies.setdefault(str(corpus), table.name)
    if len(studies) > 1:
        names = " and ".join(studies.values())
        raise UserError(f"the runs of {names} read different data; report on them separately")


def _check_model(row: Row, study: str, first_study: str, first: Row) -> None:
    """Check that a row has the model of the first row of its variant and size.

    Raises:
        UserError: It has another one.
    """
    for field in _MODEL_FIELDS:
        if getattr(row, field) != getattr(first, field):
            raise UserError(
                f"{row.variant} at size {row.size} has {field} {getattr(first, field)} in {first_study}, and "
                f"{getattr(row, field)} in {study}; name the sizes differently, or report on them separately"
            )
