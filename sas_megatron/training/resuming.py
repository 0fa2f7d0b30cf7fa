"""Checks whether a run can be resumed, or branched from a checkpoint of another run; no torch.

Trunk and branches: runs with the same learning rate and different lengths share their steps until the
shortest begins to decay (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395, section 4).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.checkpoint.manifest import (
    CONFIG,
    DamagedCheckpoint,
    find_checkpoints,
    raise_if_damaged,
    read_manifest,
)
from sas_megatron.checkpoint.trained_run import offering_another_checkpoint
from sas_megatron.checkpoint.weights_source import read_checkpoint_config
from sas_megatron.config.errors import FieldError, FileProblem, UserError, translate_os_errors
from sas_megatron.config.loading import find_differences, format_override, load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.file_records import find_damage
from sas_megatron.io.run_record import RECORD
from sas_megatron.training.data_identity import DATA_PATHS, raise_if_data_differ

# Fields that may change when a run is resumed. They do not affect samples, weights or losses, except that
# `health` decides whether harmful steps are skipped.
RESUME_MAY_CHANGE = (
    "health.",
    "logging.",
    "evaluation.",
    "checkpoint.",
    "parallel.",
    "optimizer.distributed",
    "training.micro_batch_size",
    "training.recompute",
    "model.output_loss",
    "training.deterministic",
    "attention.kv_cache",
    "data.index_cache",
    "training.stop_after_steps",
    "training.stop_after_seconds",
    "training.collective_timeout_minutes",
)
# Kinds of records that an evaluation writes, or the step before it.
EVALUATION_RECORDS = ("validation", "probe", "update")
# A branch may also have another length, with the same order of samples, and another decay.
BRANCH_MAY_CHANGE = (
    *RESUME_MAY_CHANGE,
    "training.num_steps",
    "training.order_steps",
    "schedule.kind",
    "schedule.decay_steps",
    "schedule.final_fraction",
)


@dataclass(frozen=True)
class Branch:
    """The checkpoint of another run, the trunk, from which a run starts, and its step."""

    checkpoint: Path
    step: int

    @property
    def trunk(self) -> Path:
        """The run directory of the trunk."""
        return self.checkpoint.parents[1]

    def read_metrics(self, config: RunConfig) -> KeptRecords:
        """Return the records of the trunk's metrics.jsonl that the branch shares: those up to its first step.

        An evaluation that the trunk made only because it ended there is left out, with its measurements,
        because a trunk that is still running has not made it.

        Raises:
            FileProblem: The file cannot be read.
        """
        interval = config.evaluation.interval
        found = read_metrics_until(self.trunk / "metrics.jsonl", self.step)
        lines = []
        for line in found.lines:
            record = json.loads(line)
            is_due = interval is not None and record["step"] % interval == 0
            if record["kind"] not in EVALUATION_RECORDS or is_due:
                lines.append(line)
        return KeptRecords(lines, num_unreadable=found.num_unreadable)


@dataclass(frozen=True)
class KeptRecords:
    """The lines of a metrics.jsonl up to a step, and the numbers of the lines that were left out."""

    lines: list[str]
    # Records of later steps.
    num_later: int = 0
    # Lines that are no records: a crash or a full disk leaves incomplete ones.
    num_unreadable: int = 0


def read_metrics_until(metrics: Path, step: int) -> KeptRecords:
    """Return the records of a metrics.jsonl up to and including a step.

    Raises:
        FileProblem: The file cannot be read.
    """
    with translate_os_errors(metrics, problem="cannot be read", remedy="check its permissions"):
        lines = [line for line in metrics.read_bytes().splitlines() if line.strip()]
    read = [(line, found) for line in lines if (found := _read_step(line)) is not None]
    kept = [line.decode() for line, found in read if found <= step]
    return KeptRecords(kept, num_later=len(read) - len(kept), num_unreadable=len(lines) - len(read))


def _read_step(line: bytes) -> int | None:
    """Return the step of a record; None for a line that is no record."""
    try:
        record = json.loads(line)
        step, kind = record["step"], record["kind"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and isinstance(kind, str) else None


def find_saved_config(run: Path) -> tuple[RunConfig, Path] | None:
    """Return the config with which a run was trained, and its file; None if the directory holds no run.

    It is the config of the newest checkpoint, which has a checksum, or config.yaml without a checkpoint.

    Raises:
        FileProblem: The config cannot be read.
    """
    for path in find_checkpoints(run / "checkpoints"):
        try:
            return read_checkpoint_config(path), path / CONFIG
        except DamagedCheckpoint:
            continue  # as for its tensors, an earlier checkpoint is used
    path = run / CONFIG
    if not path.exists():
        return None
    try:
        return load_run_config(path), path
    except UserError as error:
        reason = (
            error.problem
            if isinstance(error, FileProblem)
            else f"is not a valid config ({'; '.join(str(error).splitlines())})"
        )
        remedy = "restore it from a copy, or remove it: the run has no checkpoint, so it starts again"
        raise FileProblem(path, reason, remedy) from None


def check_resumable(config: RunConfig) -> None:
    """Check that the run directory, if it holds a run, holds one of the same config and data.

    Raises:
        FieldError: The config or the data differ in a field that must not change.
        FileProblem: The saved config or run.json is damaged.
    """
    directory = Path(config.logging.run_directory)
    saved = find_saved_config(directory)
    if saved is not None:
        _check_config(config, *saved)
    if (directory / RECORD).exists():
        raise_if_data_differ(config, directory)


def check_checkpoint_config(config: RunConfig, checkpoint: Path) -> None:
    """Check that a checkpoint of the run to resume was saved with the same config.

    Raises:
        FieldError: The config differs in a field that must not change.
        FileProblem: The config of the checkpoint cannot be read.
    """
    _check_config(config, read_checkpoint_config(checkpoint), checkpoint / CONFIG)


def _check_config(config: RunConfig, saved: RunConfig, origin: Path) -> None:
    run = Path(config.logging.run_directory)
    # Without the record of the run, whose data are compared by their contents, the paths must be equal.
    ignored = (*RESUME_MAY_CHANGE, *(DATA_PATHS if (run / RECORD).exists() else ()))
    _raise_if_fields_differ(
        config,
        saved,
        ignored=ignored,
        owner=f"the run to resume ({origin})",
        alternative="choose another logging.run_directory",
    )


def _raise_if_fields_differ(
    config: RunConfig, saved: RunConfig, *, ignored: tuple[str, ...], owner: str, alternative: str
) -> None:
    for field, (new, previous) in find_differences([config, saved], ignored=ignored).items():
        raise FieldError(
            field,
            new,
            f"was {previous} in {owner}",
            f"restore the old value, or {alternative}",
            (format_override(field, previous),),
        )


def describe_config_repair(config: RunConfig) -> str | None:
    """Describe the difference of config.yaml from the config of the checkpoint, which is resumed.

    None if there is none, or the directory holds no checkpoint.

    Raises:
        FileProblem: The config of the checkpoint cannot be read.
    """
    run = Path(config.logging.run_directory)
    saved = find_saved_config(run)
    path = run / CONFIG
    if saved is None or saved[1] == path:
        return None
    if not path.exists():
        state = "is missing"
    else:
        try:
            ignored = (*RESUME_MAY_CHANGE, *DATA_PATHS)
            differences = find_differences([load_run_config(path), saved[0]], ignored=ignored)
        except UserError:
            state = "is damaged"
        else:
            if not differences:
                return None
            state = f"differs from the config of the run in {', '.join(differences)}"
    return f"{path}: {state}; it is written again, according to {saved[1]}"


def find_branch(config: RunConfig) -> Branch | None:
    """Return the checkpoint that `checkpoint.branch_from` names, if it is set; its tensors are not verified.

    Raises:
        UserError: The checkpoint does not exist, or the run itself would have other weights at that step.
    """
    if config.checkpoint.branch_from is None:
        return None
    path = Path(config.checkpoint.branch_from)
    with offering_another_checkpoint(path, suggest_branch):
        manifest = read_manifest(path)
        raise_if_damaged(path, find_damage(path, {CONFIG: manifest.files[CONFIG]}))
    # The path is absolute, because run.json keeps it for later sessions, which may start in another folder.
    branch = Branch(path.resolve(), manifest.step)
    trunk = load_run_config(path / CONFIG)
    _check_schedules(config, trunk, branch)
    _raise_if_fields_differ(
        config,
        trunk,
        ignored=(*BRANCH_MAY_CHANGE, *DATA_PATHS),
        owner=f"the run that saved {path}",
        alternative="remove checkpoint.branch_from",
    )
    if config.training.num_ordered_samples != trunk.training.num_ordered_samples:
        raise FieldError(
            "training.order_steps",
            config.training.order_steps,
            f"the samples of {path} are in the order of a run of "
            f"{trunk.training.order_steps or trunk.training.num_steps} steps",
            "set the number of steps of the longest run, the same in all runs",
        )
    for name in ("run.json", "metrics.jsonl"):
        if not (branch.trunk / name).is_file():
            raise FileProblem(
                branch.trunk / name,
                "is missing, and a branch needs it",
                "name a checkpoint in the directory of its run",
            )
    raise_if_data_differ(config, branch.trunk)
    return branch


def suggest_branch(other: Path) -> str:
    """Return a suggestion for `offering_another_checkpoint` of a branch."""
    return f"branch from another checkpoint: checkpoint.branch_from={other}"


def _check_schedules(config: RunConfig, trunk: RunConfig, branch: Branch) -> None:
    """Check that up to the branch both runs have the same warm-up and then the peak learning rate."""
    for name, run in (("the run", config), (f"the run of {branch.checkpoint}", trunk)):
        kind = run.schedule.kind
        if kind not in ("constant", "warmup_stable_decay"):
            raise FieldError(
                "schedule.kind",
                kind,
                f"the learning rate of {name} at step {branch.step} depends on the length of the run",
                "use warmup_stable_decay for the branch and constant for the trunk",
            )
        stable_until = run.training.num_steps - (run.schedule.decay_steps or 0)
        if stable_until < branch.step:
            raise FieldError(
                "schedule.decay_steps",
                run.schedule.decay_steps,
                f"{name} decays its learning rate from step {stable_until} on, before the branch at step "
                f"{branch.step}",
                "branch from an earlier checkpoint, or decay over fewer steps",
            )
