"""Load the files of a finished run as `Run`, and check that runs are comparable.

config.yaml  run.json  summary.json  metrics.jsonl
     |          |           |             |
  RunConfig  provenance  RunSummary  train curve, validation curve
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.config.loading import find_differences, load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import causal_half
from sas_megatron.scaling.layer_measurements import LayerMeasurements, join_measurements
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.run_records import (
    CurvePoint,
    HealthEvent,
    Probe,
    RunSummary,
    TrainPoint,
    ValidationPoint,
)
from sas_megatron.training.data_identity import DATA_PATHS, corpus_contents

# The fields that a comparison varies, and fields that do not affect the result. A resumed run equals the
# uninterrupted one, so checkpoint settings may differ.
VARIED_KEYS = ("attention", "model.ffn_hidden_size")
INERT_KEYS = (
    "logging.run_directory",
    "logging.tracker",
    "data.index_cache",
    "evaluation.probe_sequences",
    "checkpoint.resume",
    "checkpoint.keep_",
    "checkpoint.asynchronous",
)
FINISHED = "finished"
_FIELDS: dict[Axis, str] = {
    "tokens": "consumed_tokens",
    "flops": "training_flops",
    "seconds": "elapsed_seconds",
}


@dataclass(frozen=True)
class Run:
    """A finished run, loaded from its files. The name is that of its directory."""

    name: str
    directory: Path
    config: RunConfig
    provenance: Mapping[str, Any]
    summary: RunSummary
    train_curve: tuple[CurvePoint, ...]
    validation_curve: tuple[CurvePoint, ...]
    remarks: tuple[str, ...] = ()
    measurements: LayerMeasurements = field(default_factory=LayerMeasurements)

    def spent(self, point: CurvePoint, axis: Axis) -> float | None:
        """Return the amount spent up to a point; None for the causal half if FLOPs by term are not recorded.

        Raises:
            KeyError: The axis is "params".
        """
        if axis != "causal_flops":
            return float(getattr(point, _FIELDS[axis]))
        terms = self.summary.training_flops_per_token
        if not terms:
            return None
        half = causal_half(terms, sequence_length=self.config.data.sequence_length)
        return point.training_flops * sum(half.values()) / sum(terms.values())


_Curves = tuple[tuple[CurvePoint, ...], tuple[CurvePoint, ...]]
_METRICS_LINE: TypeAdapter[TrainPoint | ValidationPoint | HealthEvent | Probe] = TypeAdapter(
    Annotated[TrainPoint | ValidationPoint | HealthEvent | Probe, Field(discriminator="kind")]
)


def load_run(directory: str | Path) -> Run:
    """Load a finished run from its directory.

    Raises:
        FileProblem: The directory or a file is missing or invalid, or the run has not finished.
    """
    directory = Path(directory)
    remedy = "give a run directory that `sas-megatron train` wrote"
    if not directory.is_dir():
        raise FileProblem(directory, "is not a directory", remedy)
    summary_path = directory / "summary.json"
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise FileProblem(directory / name, "is missing", remedy)
    unfinished = "resume it with checkpoint.resume=true, or leave this run out"
    if not summary_path.is_file():
        raise FileProblem(summary_path, "is missing, so the run has not finished", unfinished)
    summary = _read_summary(summary_path)
    if summary.exit_reason != FINISHED:
        raise FileProblem(
            summary_path,
            f"the run stopped at step {summary.steps} (exit_reason: {summary.exit_reason})",
            unfinished,
        )
    provenance = _read_object(directory / "run.json")
    _check_config_checksum(directory / "config.yaml", provenance)
    (train_curve, validation_curve), measurements, remarks = _read_metrics(directory / "metrics.jsonl")
    if summary.health is not None and summary.health.skipped_steps:
        remarks += (
            f"{summary_path}: the update of {summary.health.skipped_steps} steps was skipped (see `health`).",
        )
    return Run(
        # resolve() gives "." a name as well.
        name=directory.resolve().name,
        directory=directory,
        config=_read_config(directory / "config.yaml"),
        provenance=provenance,
        summary=summary,
        train_curve=train_curve,
        validation_curve=validation_curve,
        measurements=measurements,
        remarks=remarks,
    )


def has_finished(directory: Path) -> bool:
    """Return whether the run in a directory has finished; a run that was stopped to be resumed has not."""
    if (directory / "stopped.json").exists():
        return False
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and summary.get("exit_reason") == FINISHED


def check_comparable(runs: Sequence[Run]) -> None:
    """Check that runs differ in their attention and MLP width only.

    Raises:
        UserError: There are fewer than two runs, two runs have the same name, or other settings differ; the
            message lists each difference.
    """
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise UserError(f"a comparison of {len(runs)} run(s): needs two or more; give the baseline first")
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two runs are named {name}: names must be unique in a comparison; rename a directory"
            )
    differences: dict[str, tuple[Any, ...]] = {
        key: values
        for key, values in find_differences([run.config for run in runs]).items()
        if not _may_differ(key)
    }
    recorded = {
        "corpus": tuple(corpus_contents(run.provenance) for run in runs),
        "world_size": tuple(run.provenance.get("world_size") for run in runs),
    }
    for key, values in recorded.items():
        known = [value for value in values if value is not None]
        if any(value != known[0] for value in known):
            differences[f"run.json {key}"] = tuple(run.provenance.get(key) for run in runs)
        elif key == "corpus" and len(known) == len(runs) and isinstance(known[0], list):
            for field in DATA_PATHS:  # different paths of equal contents
                differences.pop(field, None)
    if differences:
        lines = [
            f"  {key}: " + ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
            for key, values in differences.items()
        ]
        raise UserError(
            f"these runs differ in fields other than {' and '.join(VARIED_KEYS)}, so that a comparison would "
            "not be fair; train them again with equal values of\n" + "\n".join(lines)
        )


def _may_differ(key: str) -> bool:
    return key.startswith((*INERT_KEYS, *VARIED_KEYS))


def _read_config(path: Path) -> RunConfig:
    try:
        return load_run_config(path)
    except FileProblem:
        raise
    except UserError as error:
        raise FileProblem(
            path, f"is not a valid config ({error})", "load it with the version that wrote it"
        ) from None


def _check_config_checksum(path: Path, provenance: Mapping[str, Any]) -> None:
    """Check that config.yaml is what the run wrote, if run.json records its checksum."""
    recorded = provenance.get("config_sha256")
    if recorded not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        raise FileProblem(
            path,
            "was changed after the run wrote it (config_sha256 in run.json)",
            "restore it, for example from config.yaml in a folder of checkpoints/",
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileProblem(path, f"is not JSON ({error})", "restore the file, or train again") from None
    if not isinstance(value, dict):
        raise FileProblem(path, "is not a JSON object", "restore the file, or train again")
    return value


def _read_summary(path: Path) -> RunSummary:
    try:
        return RunSummary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise FileProblem(path, _describe(error), "restore the file, or train again") from None


def _read_metrics(path: Path) -> tuple[_Curves, LayerMeasurements, tuple[str, ...]]:
    """Return both curves, the measurements by layer, and a remark if an incomplete line was ignored.

    A run that was resumed from an older checkpoint has logged the steps after it twice: the last record
    counts.
    """
    lines = [(number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    train: list[CurvePoint] = []
    validation: list[CurvePoint] = []
    probes: list[Probe] = []
    remarks: tuple[str, ...] = ()
    for position, (number, line) in enumerate(lines):
        try:
            point = _METRICS_LINE.validate_json(line)
        except ValidationError as error:
            # A process that is killed while writing leaves at most its last line incomplete.
            if position == len(lines) - 1 and error.errors()[0]["type"] == "json_invalid":
                remarks = (f"{path}: the last line ({number}) is incomplete and was ignored.",)
                break
            raise FileProblem(f"{path}:{number}", _describe(error), "correct or remove the line") from None
        if isinstance(point, Probe):
            probes.append(point)
        if isinstance(point, HealthEvent | Probe):
            continue
        for curve in (train, validation):
            while curve and curve[-1].step > point.step:
                curve.pop()
        curve = train if isinstance(point, TrainPoint) else validation
        if curve and curve[-1].step == point.step:
            curve.pop()
        curve.append(point)
    for curve in (train, validation):
        _check_order(path, curve)
    measurements = join_measurements((probe.step, probe.layers) for probe in probes)
    return (tuple(train), tuple(validation)), measurements, remarks


def _check_order(path: Path, curve: Sequence[CurvePoint]) -> None:
    for before, after in itertools.pairwise(curve):
        for name in _FIELDS.values():
            if getattr(after, name) < getattr(before, name):
                raise FileProblem(
                    path,
                    f"{name} decreases from {getattr(before, name)} at step {before.step} "
                    f"to {getattr(after, name)} at step {after.step}, although it is cumulative",
                    "train again, or leave this run out",
                )


def _describe(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = ".".join(str(part) for part in problem["loc"])
    return f"{location + ': ' if location else ''}{problem['msg'][0].lower()}{problem['msg'][1:]}"
