"""Files of small studies, and of their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import dump_tree, dump_yaml
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.plan_builder import build_plan
from sas_megatron.scaling.study.study_file import load_study
from tests.scaling.conftest import build_tree

SIZES = {
    "small": {"model.hidden_size": 24, "attention.num_heads": 4},
    "large": {"model.num_layers": 4},
}


def study_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a study of two attentions, sizes and budgets; `changes` replace top-level keys."""
    return {
        "base": "base.yaml",
        "directory": str(folder / "study"),
        "variants": {"mha": {}, "sas": {"head_expansion": 2, "simulated_head_dim": 8}},
        "sizes": SIZES,
        "budgets": {"tokens_per_parameter": [1, 2.5]},
        "match": "none",
        **changes,
    }


def write_study(folder: Path, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a study file and its base, by default that of `tests.scaling.conftest`."""
    (folder / "base.yaml").write_text(dump_tree(base or build_tree()), encoding="utf-8")
    path = folder / "study.yaml"
    path.write_text(dump_tree(study_tree(folder, **changes)), encoding="utf-8")
    return path


def plan_of(folder: Path, *, rates: Any = None, **changes: Any) -> Plan:
    """Return the plan of the study that `write_study` writes."""
    study, base = load_study(write_study(folder, **changes))
    return build_plan(study, base, rates=rates)


def leave_run(run: PlannedRun, *, loss: float | None = 4.0, exit_reason: str | None = "finished") -> None:
    """Write the files of a finished run; without `exit_reason`, of a diverged run."""
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(dump_yaml(run.config), encoding="utf-8")
    provenance = {"machine": "made up", "world_size": 1, "packages": {"torch": "2"}, "corpus": "tales"}
    (run.directory / "run.json").write_text(json.dumps(provenance))
    position = {"step": 5, "consumed_tokens": 5, "training_flops": 5.0, "elapsed_seconds": 0.5}
    lines = [{"kind": "train", **position, "train_loss": 6.0}]
    if exit_reason is None:
        lines.append({"kind": "health", "step": 6, "quantity": "loss", "response": "stop"})
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if exit_reason is not None:
        summary = {"exit_reason": exit_reason, "steps": 5, "tokens": 5, "final_validation_loss": loss}
        (run.directory / "summary.json").write_text(json.dumps(summary | {"training_seconds": 0.5}))
