"""Parameter groups: each parameter has the learning rate and weight decay of its kind."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.run_configs import small_config

PEAK, FINAL_FRACTION, DECAY, WARMUP, STEPS = 0.01, 0.25, 0.3, 4, 20
RATE_MULTIPLIER, DECAY_MULTIPLIER = 3.0, 0.5


def config_of(**changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "attention": {"kind": "sas", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "head_expansion": 2},
        "model": {"linear_bias": True, "normalization": "layernorm"},
        "optimizer": {
            "learning_rate": PEAK,
            "weight_decay": DECAY,
            "simulation_learning_rate_multiplier": RATE_MULTIPLIER,
            "simulation_weight_decay_multiplier": DECAY_MULTIPLIER,
        },
        "schedule": {"warmup_steps": WARMUP, "final_fraction": FINAL_FRACTION},
        "training": {"num_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    }
    for name, fields in changes.items():
        sections[name] = {**sections[name], **fields}
    return small_config(**sections)


def _rates_and_decays(config: RunConfig, step: int) -> dict[str, tuple[float, float]]:
    """Return, on a rank, the learning rate and weight decay of every parameter at one step, by name."""
    from sas_megatron.training.build import build_engine

    in_layout(config.parallel)
    engine = build_engine(config)
    for _ in range(step):
        engine.schedule.step(1)
    names = {id(parameter): name for name, parameter in engine.model_chunks[0].named_parameters()}
    settings: dict[str, tuple[float, float]] = {}
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))  # KeyError if it is in two groups
            settings[name] = (group["lr"], group["weight_decay"])
    assert not names, f"not in any group: {sorted(names.values())}"
    return settings


def _elements_by_group(config: RunConfig) -> dict[tuple[float, float], int]:
    """Return, on a rank, the number of optimized elements by learning rate and weight decay."""
    from sas_megatron.training.build import build_engine

    in_layout(config.parallel)
    engine = build_engine(config)
    for _ in range(WARMUP):
        engine.schedule.step(1)
    counted: dict[tuple[float, float], int] = {}
    for optimizer in engine.optimizers():
        for group in optimizer.optimizer.param_groups:
            key = (round(group["lr"], 9), round(group["weight_decay"], 9))
            counted[key] = counted.get(key, 0) + sum(parameter.numel() for parameter in group["params"])
    return counted


def rate_at(step: int, kind: str = "cosine") -> float:
    """Return the base learning rate according to the definition of the schedule."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    elapsed = min(1.0, (step - WARMUP) / (STEPS - WARMUP))
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * elapsed)), "linear": 1 - elapsed, "constant": 1.0}[kind]
    return PEAK * (FINAL_FRACTION + (1 - FINAL_FRACTION) * share)


@pytest.mark.parametrize("step", [1, 4, 11, 20])
def test_every_parameter_has_the_learning_rate_and_weight_decay_of_its_kind(ranks: Any, step: int) -> None:
    (settings,) = ranks(1).run(_rates_and_decays, config_of(), step)
    for name, (rate, decay) in settings.items():
        simulated = ".simulation." in name
        vector = name.endswith("bias") or "layernorm" in name
        assert rate == pytest.approx(rate_at(step) * (RATE_MULTIPLIER if simulated else 1.0)), name
        expected = 0.0 if vector else DECAY * (DECAY_MULTIPLIER if simulated else 1.0)
        assert decay == pytest.approx(expected), name
    # Each of the two layers has parameters of each kind.
    for part in ("simulation.heads.query.refine", "simulation.features.key.expand_bias", "layernorm.weight"):
        assert sum(part in name for name in settings) >= 2, part


@pytest.mark.parametrize("kind", ["linear", "constant"])
@pytest.mark.parametrize("step", [2, 13, 20])
def test_the_schedule_follows_its_kind(ranks: Any, kind: str, step: int) -> None:
    (settings,) = ranks(1).run(_rates_and_decays, config_of(schedule={"kind": kind}), step)
    assert settings["decoder.final_layernorm.weight"][0] == pytest.approx(rate_at(step, kind))


def test_warmup_stable_decay_stays_at_the_peak_and_then_decays_linearly(ranks: Any) -> None:
    config = config_of(schedule={"kind": "warmup_stable_decay", "decay_steps": 8})
    rates = {
        step: ranks(1).run(_rates_and_decays, config, step)[0]["decoder.final_layernorm.weight"][0]
        for step in (2, 4, 12, 16, 20)
    }
    halfway = PEAK * (FINAL_FRACTION + (1 - FINAL_FRACTION) / 2)
    assert rates == pytest.approx({2: PEAK / 2, 4: PEAK, 12: PEAK, 16: halfway, 20: PEAK * FINAL_FRACTION})


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_groups_have_the_same_sizes_in_every_optimizer(ranks: Any, precision: str, distributed: bool) -> None:
    (plain,) = ranks(1).run(_elements_by_group, config_of())
    assert set(plain) == {
        (PEAK, DECAY),
        (PEAK, 0.0),
        (PEAK * RATE_MULTIPLIER, DECAY * DECAY_MULTIPLIER),
        (PEAK * RATE_MULTIPLIER, 0.0),
    }
    config = config_of(training={"precision": precision}, optimizer={"distributed": distributed})
    assert ranks(1).run(_elements_by_group, config) == [plain]
