"""The token files that the runs of a plan read, if they exist on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping

from sas_megatron.config.data import DataConfig
from sas_megatron.data.document_split import check_split
from sas_megatron.data.epochs import DataUse, PartCounts, describe_repetition
from sas_megatron.data.token_files import read_document_lengths, token_file
from sas_megatron.scaling.study.plan import Plan


def check_data(plan: Plan) -> None:
    """Check, before any run is started, that no run has an empty training or validation part.

    Token files that do not exist yet, or only on the machine of the runs, are checked when a run starts.

    Raises:
        FieldError: A part of a run's data is empty or shorter than a sample.
        FileProblem: Token files exist but cannot be read.
    """
    checked: list[DataConfig] = []
    for run in plan.runs:
        data = run.config.data
        if data not in checked and has_token_files(data):
            check_split(data, {prefix: read_document_lengths(prefix) for prefix in data.prefixes})
            checked.append(data)


def has_token_files(data: DataConfig) -> bool:
    """Return whether the token files of all prefixes exist on this machine."""
    # Unlike Path.exists, it is false for a name that is too long.
    return all(os.path.exists(token_file(prefix, ".json")) for prefix in data.prefixes)


def count_data_uses(plan: Plan) -> dict[str, DataUse]:
    """Return how the runs, by name, read their data; without runs whose token files are not on this machine.

    Raises:
        FileProblem: Token files exist but cannot be read.
    """
    counts: dict[str, PartCounts] = {}
    uses = {}
    for run in plan.runs:
        data = run.config.data
        key = data.model_dump_json(include={"prefixes", "split"})
        if key not in counts and has_token_files(data):
            counts[key] = PartCounts(data)
        if key in counts:
            uses[run.name] = counts[key].data_use(run.config)
    return uses


def describe_repetitions(uses: Mapping[str, DataUse]) -> list[str]:
    """Return remarks on the runs that repeat training or validation text."""
    remarks = describe_repetition({name: use.epochs for name, use in uses.items()})
    windows = {
        repetition: name for name, use in uses.items() if (repetition := use.describe_repeated_windows())
    }
    return [*remarks, *(f"{name}: {repetition}." for repetition, name in windows.items())]
