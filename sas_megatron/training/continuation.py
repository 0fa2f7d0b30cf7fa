"""What a run may go on from: its own last checkpoint, or a trunk's; no torch.

Trunk and branches: runs of one learning rate that differ in length share their steps until the first
begins to decay (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395, section 4).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.checkpoint.manifest import CONFIG, find_damage, raise_if_damaged, read_manifest
from sas_megatron.config.differences import find_differences
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.data.token_files import load_manifest

# What may change when a run is gone on with: nothing that decides samples, weights or losses, but for
# what is done about steps that would do harm.
MAY_CHANGE = (
    "health.",
    "logging.",
    "evaluation.",
    "checkpoint.",
    "parallel.",
    "optimizer.distributed",
    "training.micro_batch_size",
    "training.recompute",
    "attention.kv_cache",
    "data.index_cache",
    "training.stop_after_steps",
    "training.stop_after_seconds",
    "training.collective_timeout_minutes",
)
# What a branch may differ in beside: its length, given the order of samples, and how its rate falls.
BRANCH_MAY_CHANGE = (
    *MAY_CHANGE,
    "training.num_steps",
    "training.order_steps",
    "schedule.kind",
    "schedule.decay_steps",
    "schedule.final_fraction",
)


@dataclass(frozen=True)
class Branch:
    """Where a run branches off."""

    checkpoint: Path
    step: int

    @property
    def trunk(self) -> Path:
        """The directory of the run that saved it."""
        return self.checkpoint.parents[1]

    def read_metrics(self, config: RunConfig) -> list[str]:
        """Lines of the trunk's metrics that are the branch's as well: those until it parts.

        An evaluation at the trunk's own end is not: the trunk may not have come to it yet.
        """
        interval = config.evaluation.interval
        lines = []
        for line in read_until(self.trunk / "metrics.jsonl", self.step):
            record = json.loads(line)
            is_due = interval is not None and record["step"] % interval == 0
            if record["kind"] != "validation" or is_due:
                lines.append(line)
        return lines


def read_until(metrics: Path, step: int) -> list[str]:
    """The lines of a metrics.jsonl up to a step."""
    return [line for line in metrics.read_text(encoding="utf-8").splitlines() if _is_up_to(line, step)]


def _is_up_to(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError):
        return False  # a line cut short by a crash


def check_goes_on(config: RunConfig) -> None:
    """Raises `FieldError` where the run directory's run had another config or other data."""
    directory = Path(config.logging.run_directory)
    told = f"in the run that is to be gone on with ({directory})"
    remedy = "put it back, or choose another logging.run_directory"
    if (directory / "config.yaml").exists():
        old = load_run_config(directory / "config.yaml")
        for field, (new, was) in find_differences([config, old], but=MAY_CHANGE).items():
            raise FieldError(field, new, f"was {was} {told}", remedy)
    if (directory / "run.json").exists():
        _check_corpus(config, directory)


def find_branch(config: RunConfig) -> Branch | None:
    """Where the run branches off by `checkpoint.branch_from`, if it is to; its tensors are not looked at.

    Raises:
        UserError: there is no such checkpoint, or the run could not have come to it by itself.
    """
    if config.checkpoint.branch_from is None:
        return None
    path = Path(config.checkpoint.branch_from)
    # Kept as a text by run.json of later sessions, and found from any folder.
    manifest = read_manifest(path)
    raise_if_damaged(path, find_damage(path, {CONFIG: manifest.files[CONFIG]}))
    branch = Branch(path.resolve(), manifest.step)
    trunk = load_run_config(path / CONFIG)
    _check_schedules(config, trunk, branch)
    for field, (new, was) in find_differences([config, trunk], but=BRANCH_MAY_CHANGE).items():
        raise FieldError(
            field, new, f"was {was} in the run that {path} is of", "put it back, or begin a run without it"
        )
    if config.training.num_ordered_samples != trunk.training.num_ordered_samples:
        raise FieldError(
            "training.order_steps",
            config.training.order_steps,
            f"the samples of {path} are in the order of a run of "
            f"{trunk.training.order_steps or trunk.training.num_steps} steps",
            "name the steps of the longest run, the same in all",
        )
    for name in ("run.json", "metrics.jsonl"):
        if not (branch.trunk / name).is_file():
            raise FileProblem(
                branch.trunk / name, "is missing, and a branch takes it on", "give a checkpoint in its run"
            )
    _check_corpus(config, branch.trunk)
    return branch


def _check_schedules(config: RunConfig, trunk: RunConfig, branch: Branch) -> None:
    """Until the branch, both must have the learning rate at its peak, or warming up to it alike."""
    for name, run in (("the run", config), (f"the run of {branch.checkpoint}", trunk)):
        kind = run.schedule.kind
        if kind not in ("constant", "warmup_stable_decay"):
            raise FieldError(
                "schedule.kind",
                kind,
                f"{name} has another learning rate at step {branch.step} than a run of another length",
                "use warmup_stable_decay for the branch and constant for the trunk",
            )
        stable_until = run.training.num_steps - (run.schedule.decay_steps or 0)
        if stable_until < branch.step:
            raise FieldError(
                "schedule.decay_steps",
                run.schedule.decay_steps,
                f"{name} has its learning rate fall from step {stable_until}, and they part at {branch.step}",
                "branch off earlier, or decay over fewer steps",
            )


def _check_corpus(config: RunConfig, directory: Path) -> None:
    path = directory / "run.json"
    try:
        corpus = json.loads(path.read_text(encoding="utf-8"))["corpus"]
        recorded_sha256 = {name: files["bin_sha256"] for name, files in corpus.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileProblem(
            path, f"is damaged ({error!r})", "put it back from a copy, or take it away"
        ) from None
    for prefix in config.data.prefixes:
        recorded = recorded_sha256.get(Path(prefix).name)
        if recorded != load_manifest(prefix).bin_sha256:
            raise FieldError(
                "data.prefixes",
                prefix,
                f"holds other tokens than the run in {directory} began with",
                "give those, or choose another logging.run_directory",
            )
