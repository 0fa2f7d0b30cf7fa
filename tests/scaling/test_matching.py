from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.matching import match_parameters
from tests.scaling.conftest import build_config


def count_parameters(config: RunConfig) -> int:
    """Embedding and attention, plus a swiglu MLP: affine in the width, by hand."""
    model, heads = config.model, config.attention
    attention = model.hidden_size * heads.head_dim * (2 * heads.num_heads + 2 * heads.num_key_value_heads)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    return model.hidden_size * model.padded_vocab_size + model.num_layers * (attention + mlp)


def test_the_width_grows_by_what_fewer_key_value_heads_save() -> None:
    base = build_config()
    candidate = build_config(attention__kind="gqa", attention__num_kv_heads=2, model__ffn_hidden_size=8)
    matched = match_parameters(base, candidate, count_parameters=count_parameters)
    # Saved a layer: 36 · 6 · 2 · 4 = 1728 = 108 · 16.
    assert matched.model.ffn_hidden_size == 104 + 16
    assert count_parameters(matched) == count_parameters(base)
    assert matched.attention == candidate.attention
    assert candidate.model.ffn_hidden_size == 8


def test_the_nearest_width_is_a_multiple_of_eight_times_the_ranks() -> None:
    base = build_config(parallel__tensor=2)
    candidate = build_config(attention__kind="mqa", parallel__tensor=2)
    matched = match_parameters(base, candidate, count_parameters=count_parameters)
    # Saved a layer: 36 · 6 · 2 · 5 = 2160 = 108 · 20; 124 lies between 112 and 128.
    assert matched.model.ffn_hidden_size == 128


def test_attention_that_outweighs_the_whole_baseline_is_said() -> None:
    base = build_config(model__ffn_hidden_size=8)
    candidate = build_config(attention__head_dim=60)
    with pytest.raises(UserError) as caught:
        match_parameters(base, candidate, count_parameters=count_parameters)
    assert str(caught.value) == (
        "attention.kind=mha: without any MLP the model has 178,560 parameters, the baseline with its MLP "
        "41,184; give the variant fewer or narrower heads, or the baseline a larger model.ffn_hidden_size"
    )


def test_a_step_too_coarse_for_the_tolerance_says_how_far_off_it_is() -> None:
    base = build_config(model__ffn_hidden_size=100)
    with pytest.raises(
        UserError, match=r"nearest model\.ffn_hidden_size, 96, gives .* 1\.8% apart where 0\.1%"
    ):
        match_parameters(base, base, count_parameters=count_parameters, tolerance=0.001)


def test_the_smallest_width_is_one_step_even_where_none_would_be_nearer() -> None:
    base = build_config(model__ffn_hidden_size=2)
    matched = match_parameters(base, base, count_parameters=count_parameters, tolerance=0.5)
    assert matched.model.ffn_hidden_size == 8


def test_a_count_that_is_not_affine_is_a_fault_not_a_wrong_answer() -> None:
    base = build_config()
    with pytest.raises(ValueError, match="affine"):
        match_parameters(base, base, count_parameters=lambda config: config.model.ffn_hidden_size**2 * 99)


@settings(max_examples=150, deadline=None)
@given(
    overhead=st.integers(0, 5_000_000),
    slope=st.integers(1, 30_000),
    width=st.integers(1, 5_000),
    candidate_overhead=st.integers(0, 5_000_000),
    tensor=st.sampled_from([1, 2, 3, 6]),
)
def test_no_multiple_is_nearer_than_the_one_found(
    overhead: int, slope: int, width: int, candidate_overhead: int, tensor: int
) -> None:
    base = build_config(model__vocab_multiple=6)
    candidate = build_config(
        attention__head_dim=8, model__vocab_multiple=6, model__ffn_hidden_size=24, parallel__tensor=tensor
    )

    def count(config: RunConfig) -> int:
        if config is base:
            return overhead + slope * width
        return candidate_overhead + slope * config.model.ffn_hidden_size

    target, step = count(base), 8 * tensor
    if candidate_overhead >= target:
        with pytest.raises(UserError, match="without any MLP"):
            match_parameters(base, candidate, count_parameters=count, tolerance=1e9)
        return
    found = match_parameters(base, candidate, count_parameters=count, tolerance=1e9).model.ffn_hidden_size
    assert found % step == 0
    assert found > 0

    def distance(width: int) -> int:
        return abs(candidate_overhead + slope * width - target)

    assert distance(found) <= distance(found + step)
    if found > step:
        assert distance(found) <= distance(found - step)
