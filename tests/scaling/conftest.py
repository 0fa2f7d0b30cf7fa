"""Synthetic run directories with the files of a finished run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import build_run_config, dump_tree
from sas_megatron.config.run import RunConfig

TOKENS_PER_STEP = 7 * 51


def build_tree(**changes: Any) -> dict[str, Any]:
    """Return a small config as a tree; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "model": {"num_layers": 3, "hidden_size": 36, "ffn_hidden_size": 104, "vocab_size": 515},
        "attention": {"kind": "mha", "num_heads": 6, "head_dim": 6},
        "data": {"prefixes": ["corpora/tales"], "tokenizer": "tales.model", "sequence_length": 51},
        "optimizer": {"learning_rate": 3e-4},
        "training": {"num_steps": 90, "global_batch_size": 7, "micro_batch_size": 7},
        "logging": {"run_directory": "runs/a"},
    }
    for key, value in changes.items():
        section, field = key.split("__")
        tree.setdefault(section, {})[field] = value
    return tree


def build_config(**changes: Any) -> RunConfig:
    return build_run_config(build_tree(**changes))


def validation_line(
    step: int, loss: float | None, *, flops_per_token: float, step_seconds: float
) -> dict[str, Any]:
    tokens = step * TOKENS_PER_STEP
    return {
        "kind": "validation",
        "step": step,
        "consumed_samples": step * 7,
        "consumed_tokens": tokens,
        "training_flops": tokens * flops_per_token,
        "elapsed_seconds": step * step_seconds,
        "validation_loss": loss,
    }


def train_line(
    step: int, loss: float | None, *, flops_per_token: float, step_seconds: float
) -> dict[str, Any]:
    line = validation_line(step, None, flops_per_token=flops_per_token, step_seconds=step_seconds)
    del line["validation_loss"]
    return {**line, "kind": "train", "train_loss": loss, "gradient_norm": 1.1, "step_seconds": step_seconds}


def write_run_directory(
    root: Path,
    name: str,
    *,
    losses: dict[int, float | None],
    flops_per_token: float = 1000.0,
    step_seconds: float = 0.5,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a finished run with validation losses at the given steps, and return its directory."""
    directory = root / "runs" / name
    directory.mkdir(parents=True)
    tree = build_tree(**{"logging__run_directory": f"runs/{name}", **(config or {})})
    (directory / "config.yaml").write_text(dump_tree(tree), encoding="utf-8")
    described = {"started_at": "2026-01-03T05:07:09Z", "machine": "bench-1", "world_size": 1}
    described |= {"packages": {"torch": "2.13.0"}, "corpus": "tales"}
    (directory / "run.json").write_text(json.dumps(described | (provenance or {})))
    costs = {"flops_per_token": flops_per_token, "step_seconds": step_seconds}
    lines = []
    for step in sorted({*range(10, 91, 10), *losses}):
        lines.append(train_line(step, 6.5 - step / 50, **costs))
        if step in losses:
            lines.append(validation_line(step, losses[step], **costs))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = max(losses, default=90)
    results = {
        "exit_reason": "finished",
        "steps": last,
        "tokens": last * TOKENS_PER_STEP,
        "training_flops": last * TOKENS_PER_STEP * flops_per_token,
        "training_flops_per_token": {
            "attention": 0.375 * flops_per_token,
            "mlp": 0.625 * flops_per_token,
        },
        "parameters": {"embedding": 46080, "attention": 15552, "mlp": 33696},
        "training_seconds": last * step_seconds,
        "total_seconds": last * step_seconds + 3.7,
        "median_step_seconds": step_seconds,
        "peak_memory_bytes": 3 * 2**20,
        "final_validation_loss": losses.get(last),
        "world_size": 1,
    }
    (directory / "summary.json").write_text(json.dumps(results | (summary or {})))
    return directory


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """`write_run_directory` in the temporary directory of the test."""
    return functools.partial(write_run_directory, tmp_path)
