"""Tables of synthetic studies: SAS has a lower loss at equal tokens and 1.5 times the FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sas_megatron.scaling.layer_measurements import join_measurements
from sas_megatron.scaling.study.study_table import Row, StudyTable

# E, the factor of both terms, and the FLOPs per token relative to mha.
LAWS = {"mha": (1.8, 1.0, 1.0), "gqa": (1.8, 1.03, 1.0), "sas": (1.8, 0.93, 1.5)}
STEP_TOKENS = 2048


def build_synthetic_table(
    *,
    seeds: dict[str, int] | None = None,
    lengths: tuple[str | None, ...] = (None,),
    budgets: tuple[float, ...] = (2, 4, 8),
    num_sizes: int = 5,
    noise: float = 0.004,
) -> StudyTable:
    """Build a table with the given seeds of each variant; `lengths` are levels of a further axis."""
    generator = np.random.default_rng(0)
    rows = [
        _row(variant, size, budget, seed, length, float(generator.normal(0, noise)))
        for length in lengths
        for variant, count in (seeds or {"mha": 3, "gqa": 1, "sas": 3}).items()
        for size in range(num_sizes)
        for budget in budgets
        for seed in range(count)
    ]
    return StudyTable("made_up", "mha", tuple(rows), "2026-11-24T00:00:00+00:00", ("A remark <of> it.",))


def probe_layer(number: int, similarity: float) -> dict[str, Any]:
    """Return what a run of SAS measures in a layer, as metrics.jsonl has it."""
    return {
        "layer": number,
        "residual_rms": 1.5,
        "largest_score": [3.0, 7.0],
        "mean_entropy": [1.0, None] if similarity > 0.95 else [1.0, 2.0],
        "silent_units": {"heads.query": 0.25},
        "copy_similarity": {"query": similarity, "key": 0.5},
    }


def with_measurements(table: StudyTable) -> StudyTable:
    """Add what runs measured in three layers, of which only those of sas have simulated copies."""
    rows = []
    for row in table.rows:
        found = join_measurements(
            (step, [probe_layer(layer, (layer + 10 * row.seed) / step) for layer in (1, 2, 3)])
            for step in (100, 200)
        )
        curves, layers = (
            {name: of_name for name, of_name in values.items() if row.variant == "sas" or "." not in name}
            for values in (found.curves, found.layers)
        )
        rows.append(
            dataclasses.replace(row, layer_steps=found.steps, layer_curves=curves, layer_values=layers)
        )
    return dataclasses.replace(table, rows=tuple(rows))


def _row(variant: str, size: int, budget: float, seed: int, length: str | None, error: float) -> Row:
    irreducible, factor, cost = LAWS[variant]
    parameters = int(1e5 * 12 ** (size / 4))
    steps = int(budget * parameters / STEP_TOKENS)
    evaluated = [int(step) for step in np.unique(np.linspace(10, steps, 12).astype(int))]
    terms = {"qkv": 0.2 * parameters, "head_simulation": (cost - 1) * 3 * parameters, "mlp": 3.0 * parameters}
    flops = sum(terms.values())

    def loss(step: int) -> float:
        law = irreducible + factor * (260 / parameters**0.42 + 900 / (step * STEP_TOKENS) ** 0.5)
        return float(law + error + (0.15 if step < steps else 0.0))

    name = f"{variant}-w{size}-{budget:g}-s{seed}" + ("" if length is None else f"-{length}")
    curves: dict[str, Any] = {
        "curve_steps": evaluated,
        "curve_tokens": [step * STEP_TOKENS for step in evaluated],
        "curve_flops": [step * STEP_TOKENS * flops for step in evaluated],
        "curve_seconds": [0.1 * step for step in evaluated],
        "curve_loss": [loss(step) for step in evaluated],
    }
    return Row(
        run=name,
        status="done",
        variant=variant,
        attention=variant,
        size=f"w{size}",
        levels={} if length is None else {"length": length},
        seed=seed,
        budget=budget,
        sequence_length=256,
        params=parameters,
        params_without_embeddings=parameters // 2,
        tokens=steps * STEP_TOKENS,
        steps=steps,
        training_flops=steps * STEP_TOKENS * flops,
        flops_6nd=6.0 * parameters * steps * STEP_TOKENS,
        flops_per_token=terms,
        learning_rate=0.004,
        global_batch_size=8,
        schedule="warmup_stable_decay",
        trunk="trunk",
        loss=loss(steps),
        train_loss=loss(steps),
        bits_per_byte=loss(steps) / 2.1,
        training_seconds=0.1 * steps,
        median_step_seconds=0.1,
        step_seconds=flops * STEP_TOKENS / 3e10,
        peak_memory_bytes=3 * 10**8,
        world_size=1,
        machine="made up",
        git="abc",
        provenance_sha256="0f" * 32,
        **curves,
    )
