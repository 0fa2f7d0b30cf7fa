"""The collected table of a study: one row per planned result, with its validation curve.

It is stored as Parquet. The report, the laws and the comparison read this table and no run directories.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.costs.flops import causal_half
from sas_megatron.io.files import make_folder, replace_file

# Version 4 added study, host and data of a run, budget and seed of a sweep, losses of named validation sets,
# and measurements inside the models; version 3 added rounds of step times, sweeps and withdrawn variants;
# version 2 added the epochs.
SCHEMA_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Row:
    """One run.

    Losses are in nats per token on the held-out windows. FLOPs are counted by `costs.flops`, with full
    attention. `status` is done, diverged or missing; if it is not done, measured values are None and counted
    values are taken from the plan. `levels` are the levels of further axes; curves contain the evaluations.
    """

    run: str
    status: str
    variant: str
    attention: str
    size: str
    levels: dict[str, str]
    seed: int
    budget: float
    sequence_length: int
    params: int
    params_without_embeddings: int
    tokens: int
    steps: int
    training_flops: float
    # 6 N D, a common approximation of the training FLOPs; N includes embeddings.
    flops_6nd: float
    flops_per_token: dict[str, float]
    learning_rate: float
    global_batch_size: int
    schedule: str
    trunk: str | None = None
    # How many times the run read its training data; None if it is not recorded.
    epochs: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    bits_per_byte: float | None = None
    # The losses of named validation sets (`evaluation.sets`); each is a column `loss.NAME` of the file.
    set_losses: dict[str, float | None] = field(default_factory=dict)
    training_seconds: float | None = None
    median_step_seconds: float | None = None
    # Measured in alternation with the other cells (`study time`), hence comparable; None if not measured.
    step_seconds: float | None = None
    # The measurements of which it is the median, one per round.
    step_rounds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    world_size: int | None = None
    machine: str | None = None
    git: str | None = None
    # The host of its last session, the study that planned it, and a checksum of what identifies its token
    # files; None in tables of version 3 and earlier.
    host: str | None = None
    study: str | None = None
    corpus_sha256: str | None = None
    # Checksum of run.json, which identifies the run that the row was collected from.
    provenance_sha256: str | None = None
    curve_steps: list[int] = field(default_factory=list)
    curve_tokens: list[int] = field(default_factory=list)
    curve_flops: list[float] = field(default_factory=list)
    curve_seconds: list[float] = field(default_factory=list)
    curve_loss: list[float | None] = field(default_factory=list)
    # Measurements inside the model (`layer_measurements`): the steps, by name the mean over layers at each of
    # them, and by name the values of the layers at the last one.
    layer_steps: list[int] = field(default_factory=list)
    layer_curves: dict[str, list[float | None]] = field(default_factory=dict)
    layer_values: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def causal_flops(self) -> float:
        """The training FLOPs with the causal half of the attention."""
        half = causal_half(self.flops_per_token, sequence_length=self.sequence_length)
        return self.tokens * sum(half.values())


# Size, budget and seed of a sweep.
SweepCell = tuple[str, float | None, int | None]


@dataclass(frozen=True)
class SweepRun:
    """A run of a learning rate sweep; `loss` is None if it diverged.

    `budget` and `seed` are None in tables of version 3 and earlier.
    """

    variant: str
    size: str
    learning_rate: float
    loss: float | None
    budget: float | None = None
    seed: int | None = None

    @property
    def cell(self) -> SweepCell:
        """Size, budget and seed, in which the losses of two variants are comparable."""
        return self.size, self.budget, self.seed


@dataclass(frozen=True)
class StudyTable:
    """The rows of a study, its name and baseline, and the remarks of the collection.

    `sweeps` are the runs of its learning rate sweeps. `withdrawn` names variants that are not compared, with
    the reason.
    """

    name: str
    baseline: str
    rows: tuple[Row, ...]
    collected_at: str
    remarks: tuple[str, ...] = ()
    sweeps: tuple[SweepRun, ...] = ()
    withdrawn: dict[str, str] = field(default_factory=dict)


# Mappings are stored as JSON text, since their keys differ between rows.
_MAPPINGS = ("levels", "flops_per_token", "layer_curves", "layer_values")
_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
    "dict[str, str]": pa.string(),
    "dict[str, float]": pa.string(),
    "dict[str, list[float | None]]": pa.string(),
    "list[int]": pa.list_(pa.int64()),
    "list[float]": pa.list_(pa.float64()),
    "list[float | None]": pa.list_(pa.float64()),
}
_SETS, _SET_PREFIX = "set_losses", "loss."
_SCHEMA = pa.schema(
    [(item.name, _TYPES[str(item.type)]) for item in dataclasses.fields(Row) if item.name != _SETS]
)


def write_table(table: StudyTable, path: Path) -> None:
    """Write the table atomically: on an error, an existing file is unchanged."""
    rows = [_record_row(row) for row in table.rows]
    sets = list(dict.fromkeys(name for row in table.rows for name in row.set_losses))
    schema = pa.schema([*_SCHEMA, *((_SET_PREFIX + name, pa.float64()) for name in sets)])
    about = {
        "schema_version": SCHEMA_VERSION,
        "name": table.name,
        "baseline": table.baseline,
        "collected_at": table.collected_at,
        "remarks": table.remarks,
        "sweeps": [dataclasses.asdict(run) for run in table.sweeps],
        "withdrawn": table.withdrawn,
    }
    built = pa.Table.from_pylist(rows, schema=schema.with_metadata({"study": json.dumps(about)}))
    with translate_os_errors(path, problem="cannot be written", remedy="choose another --output"):
        make_folder(path.parent)
        with replace_file(path) as temporary:
            pq.write_table(built, temporary)


def read_table(path: str | Path) -> StudyTable:
    """Read a table that `write_table` wrote.

    Raises:
        FileProblem: The file is missing, is not a study's table, or has an unknown schema version.
    """
    remedy = "give the table that `sas-megatron study collect` wrote"
    try:
        built = pq.read_table(path)
        built.validate(full=True)  # reading values of damaged arrays could end the process
        about = json.loads((built.schema.metadata or {}).get(b"study", b"{}"))
        version = about.get("schema_version")
        if version not in READABLE_VERSIONS:
            known = " or ".join(map(str, READABLE_VERSIONS))
            raise FileProblem(path, f"has schema version {version}, not {known}, of a study's table", remedy)
        rows = tuple(_read_row(row) for row in built.to_pylist())
        return StudyTable(
            about["name"],
            about["baseline"],
            rows,
            about["collected_at"],
            tuple(about["remarks"]),
            tuple(SweepRun(**run) for run in about.get("sweeps", ())),
            dict(about.get("withdrawn", {})),
        )
    except FileNotFoundError:
        raise FileProblem(
            path, "does not exist", "run `sas-megatron study collect` first, which writes it"
        ) from None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileProblem(path, f"cannot be read ({' '.join(str(error).split())})", remedy) from None


def _record_row(row: Row) -> dict[str, Any]:
    """Return the values of a row by column."""
    values = {item.name: getattr(row, item.name) for item in dataclasses.fields(row)}
    sets = values.pop(_SETS)
    recorded = {name: json.dumps(value) if name in _MAPPINGS else value for name, value in values.items()}
    return recorded | {_SET_PREFIX + name: loss for name, loss in sets.items()}


def _read_row(recorded: dict[str, Any]) -> Row:
    """Return the row of the values by column. A set that a run does not have is left out."""
    sets = {name: loss for name, loss in recorded.items() if name.startswith(_SET_PREFIX)}
    values = {
        name: json.loads(value) if name in _MAPPINGS else value
        for name, value in recorded.items()
        if name not in sets
    }
    known = {name.removeprefix(_SET_PREFIX): loss for name, loss in sets.items() if loss is not None}
    return Row(**values, set_losses=known)
