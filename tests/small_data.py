"""Runs on a small corpus of real text, which the fixture `small_data` prepares once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import build_run_config
from sas_megatron.config.run import RunConfig


@dataclass(frozen=True)
class SmallData:
    """Token files of 400 kB of real text."""

    prefix: Path
    tokenizer: Path

    def run(self, directory: Path, **sections: dict[str, Any]) -> RunConfig:
        """Return a run that takes a few seconds; `sections` override its fields."""
        tree: dict[str, dict[str, Any]] = {
            "model": {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "vocab_size": 512},
            "attention": {"kind": "sas", "num_heads": 4, "head_dim": 12, "head_expansion": 2},
            "data": {
                "prefixes": [str(self.prefix)],
                "tokenizer": str(self.tokenizer),
                "sequence_length": 40,
                "split": [0.8, 0.2],
            },
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"kind": "cosine", "warmup_steps": 3},
            "training": {"num_steps": 20, "global_batch_size": 8, "micro_batch_size": 4},
            "evaluation": {"num_sequences": 6, "interval": 10},
            "logging": {"run_directory": str(directory), "interval": 1, "trackers": []},
        }
        for section, fields in sections.items():
            tree.setdefault(section, {}).update(fields)
        return build_run_config(tree)
