"""Equal time, against machines whose step times are known exactly; and once on this one."""

from __future__ import annotations

import random

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.matching import DEPTH, MLP, Degrees
from sas_megatron.scaling.time_matching import Measure, match_time
from sas_megatron.scaling.variants import build_variant
from tests.scaling.test_matching import base_config


def machine(*, attention: dict[str, float], noise: float = 0.0, rounds: int = 5) -> Measure:
    """Steps of a second for each layer's attention, by kind, and a millisecond for each column of its MLP."""
    generator = random.Random(3)

    def seconds(config: RunConfig) -> float:
        width = config.model.ffn_hidden_size
        exact = 0.5 + config.model.num_layers * (attention[config.attention.kind] + width / 1000)
        return exact * (1 + noise * (generator.random() - 0.5))

    return lambda configs: [[seconds(config) for config in configs] for _ in range(rounds)]


def test_the_width_gives_what_slower_attention_takes() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    found = match_time(base, variant, measure=machine(attention={"mha": 1.0, "sas": 1.4}))
    # 1728 columns less 400, in steps of eight.
    assert found.config.model.ffn_hidden_size == 1328
    assert found.config.model.num_layers == base.model.num_layers
    assert abs(found.ratios["time"] - 1) < 0.005
    assert found.changes == {MLP: (1728, 1328)}
    assert set(found.ratios) == {"params", "flops", "kv", "time"}


def test_depth_gives_way_where_the_width_is_not_enough() -> None:
    base = base_config(model__num_layers=12)
    _, variant = build_variant(base, "sas")
    found = match_time(base, variant, measure=machine(attention={"mha": 1.0, "sas": 4.0}))
    assert found.config.model.num_layers < 12
    assert abs(found.config.model.ffn_hidden_size / 1728 - 1) < 0.25
    assert abs(found.ratios["time"] - 1) <= 0.01


def test_rounds_that_differ_are_evened_out_by_their_median() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    noisy = machine(attention={"mha": 1.0, "sas": 1.4}, noise=0.02, rounds=15)
    found = match_time(base, variant, measure=noisy, degrees=Degrees(tensor=(1, 2)))
    assert found.config.model.ffn_hidden_size % 16 == 0
    assert abs(found.config.model.ffn_hidden_size - 1328) < 100


def test_too_much_noise_is_named() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    wild = machine(attention={"mha": 1.0, "sas": 1.4}, noise=3.0, rounds=2)
    with pytest.raises(
        UserError, match=r"off where 0\.0% is allowed; rounds differ by .* on a quieter machine"
    ):
        match_time(base, variant, measure=wild, tolerance=1e-6)


def test_where_width_alone_is_free_and_not_enough_that_is_said() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    with pytest.raises(UserError, match=rf"nearest to the base in time is {DEPTH}=3, {MLP}=8, \+"):
        match_time(base, variant, measure=machine(attention={"mha": 1.0, "sas": 4.0}), free=(MLP,))
