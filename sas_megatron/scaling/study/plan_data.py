"""The token files that the runs of a plan read, if they exist on this machine."""

from __future__ import annotations

from sas_megatron.config.data import DataConfig
from sas_megatron.data.document_split import check_split
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
    return all(token_file(prefix, ".json").exists() for prefix in data.prefixes)
