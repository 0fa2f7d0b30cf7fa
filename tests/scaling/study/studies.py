"""Small studies for tests, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sas_megatron.config.loading import dump_tree
from tests.scaling.conftest import build_tree

SIZES = {
    "small": {"model.hidden_size": 24, "attention.num_heads": 4},
    "large": {"model.num_layers": 4},
}


def study_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two attentions at two sizes and two budgets; `changes` replace top-level keys."""
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
    """The file of a study whose base is that of `tests.scaling.conftest`, or another tree."""
    (folder / "base.yaml").write_text(dump_tree(base or build_tree()), encoding="utf-8")
    path = folder / "study.yaml"
    path.write_text(dump_tree(study_tree(folder, **changes)), encoding="utf-8")
    return path
