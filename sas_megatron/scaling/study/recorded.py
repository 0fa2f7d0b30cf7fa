"""The JSON records in a study's directory, which commands write and later commands read.

layouts.json         layouts that a search found       learning_rates.json   rates that the sweep found
step_seconds.json    measured times of a step          jobs.json             submitted SLURM jobs
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel

from sas_megatron.config.errors import FileProblem
from sas_megatron.io.file_records import describe_read_error, parse_json, read_regular_file

Seconds = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(gt=0)]


class _Recorded(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class RecordedLayout(_Recorded):
    """The layout of a cell: changed fields of its config, and the estimated seconds per step."""

    changes: dict[str, Any]
    step_seconds: Seconds


class LayoutsRecord(_Recorded):
    """layouts.json: layouts by the name of the cell."""

    layouts: dict[str, RecordedLayout]


class RatesRecord(_Recorded):
    """learning_rates.json: rates by variant and size, and cells whose best rate is the lowest or highest."""

    rates: dict[str, dict[str, Factor]]
    # Found rates as multiples of the step law; records of earlier versions have none.
    multiples: dict[str, Annotated[dict[str, Factor], Field(min_length=1)]] | None = None
    at_edge: list[str]


class MeasuredCell(_Recorded):
    """The seconds per step of a cell in each round, and the fields of its config that affect them."""

    step_seconds: Annotated[list[Seconds], Field(min_length=1)]
    config: dict[str, Any]


class StepSecondsRecord(_Recorded):
    """step_seconds.json: measurements by the name of the cell."""

    machine: dict[str, Any]
    measured_at: str
    # Processors that other processes used; records of earlier versions have none.
    other_load: float | None = None
    cells: dict[str, MeasuredCell]


class RecordedJob(_Recorded):
    """A SLURM job and the path of its output."""

    number: str
    log: str


class JobsRecord(RootModel[dict[str, RecordedJob]]):
    """jobs.json: jobs by the name of the run."""

    model_config = ConfigDict(frozen=True, strict=True)


Record = TypeVar("Record", bound=BaseModel)


def read_recorded(path: Path, record_class: type[Record], *, remedy: str) -> Record | None:
    """Return a record; None if the file does not exist.

    Args:
        path: The file.
        record_class: Its contents.
        remedy: How a user replaces a damaged file.

    Raises:
        FileProblem: The file is damaged or cannot be read.
    """
    try:
        return record_class.model_validate(parse_json(read_regular_file(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise FileProblem(path, f"is damaged ({describe_read_error(error)})", remedy) from None
