"""Small, valid run configs for tests, in which each section can be changed."""

from __future__ import annotations

from typing import Any

from sas_megatron.config.loading import build_run_config
from sas_megatron.config.run import RunConfig
from tests.conftest import ROOT

# All shipped run configs. Study files have another format and are tested in tests/scaling/study; bases are
# parts of configs.
STUDIES = ROOT / "configs" / "studies"
SHIPPED = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if STUDIES not in path.parents and path.parent.name != "bases"
)


def small_tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run with odd sizes as nested dictionaries.

    The fields of `sections` override its fields; `attention` replaces the section instead.
    """
    tree: dict[str, Any] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 20,
            "ffn_hidden_size": 28,
            "vocab_size": 45,
            "vocab_multiple": 4,
        },
        "attention": {"kind": "mha", "num_heads": 4, "head_dim": 6},
        "data": {"prefixes": ["corpus"], "tokenizer": "tokenizer.model", "sequence_length": 12},
        "optimizer": {"learning_rate": 0.01},
        "training": {"num_steps": 9, "global_batch_size": 4, "micro_batch_size": 2},
        "logging": {"run_directory": "run"},
    }
    for name, fields in sections.items():
        tree[name] = fields if name == "attention" else {**tree.get(name, {}), **fields}
    return tree


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """Return `small_tree` as a config."""
    return build_run_config(small_tree(**sections))
