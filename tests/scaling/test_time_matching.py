"""Matching in time, with simulated machines whose step times are known."""

from __future__ import annotations

import random

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.matching import DEPTH, MLP, Degrees
from sas_megatron.scaling.time_matching import RoundTimer, match_time
from sas_megatron.scaling.variants import build_variant
from tests.scaling.test_matching import base_config


def machine(*, attention: dict[str, float], noise: float = 0.0, rounds: int = 5) -> RoundTimer:
    """Return step times with seconds per layer by attention kind, and 1 ms per layer and MLP column."""
    generator = random.Random(3)

    def seconds(config: RunConfig) -> float:
        width = config.model.ffn_hidden_size
        exact = 0.5 + config.model.num_layers * (attention[config.attention.kind] + width / 1000)
        return exact * (1 + noise * (generator.random() - 0.5))

    return lambda configs: [[seconds(config) for config in configs] for _ in range(rounds)]


def test_width_compensates_for_slower_attention() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    found = match_time(base, variant, measure=machine(attention={"mha": 1.0, "sas": 1.4}))
    # 1728 - 400 columns, a multiple of eight.
    assert found.config.model.ffn_hidden_size == 1328
    assert found.config.model.num_layers == base.model.num_layers
    assert abs(found.ratios["time"] - 1) < 0.005
    assert found.changes == {MLP: (1728, 1328)}
    assert set(found.ratios) == {"params", "flops", "kv", "time"}


def test_depth_decreases_if_the_width_is_not_enough() -> None:
    base = base_config(model__num_layers=12)
    _, variant = build_variant(base, "sas")
    found = match_time(base, variant, measure=machine(attention={"mha": 1.0, "sas": 4.0}))
    assert found.config.model.num_layers < 12
    assert abs(found.config.model.ffn_hidden_size / 1728 - 1) < 0.25
    assert abs(found.ratios["time"] - 1) <= 0.01


def test_noise_is_reduced_by_the_median_over_rounds() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    noisy = machine(attention={"mha": 1.0, "sas": 1.4}, noise=0.02, rounds=15)
    found = match_time(base, variant, measure=noisy, degrees=Degrees(tensor=(1, 2)))
    assert found.config.model.ffn_hidden_size % 16 == 0
    assert abs(found.config.model.ffn_hidden_size - 1328) < 100


def test_error_states_the_noise() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    wild = machine(attention={"mha": 1.0, "sas": 1.4}, noise=3.0, rounds=2)
    with pytest.raises(UserError, match=r"more than 0\.0%; rounds differ by .* without other load"):
        match_time(base, variant, measure=wild, tolerance=1e-6)


def test_insufficient_width_alone_is_an_error() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    with pytest.raises(
        UserError, match=rf"the nearest match in time is {DEPTH}=3, {MLP}=8, with a difference of \+"
    ):
        match_time(base, variant, measure=machine(attention={"mha": 1.0, "sas": 4.0}), free=(MLP,))
