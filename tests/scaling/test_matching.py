"""Matching by counted costs: solutions are valid, within the tolerance, and nearest to the base."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.head_layout import check_context_parallel
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.matching import COUNTED_AXES, DEPTH, MLP, Degrees, counted_costs, match
from sas_megatron.scaling.variants import build_variant
from tests.scaling.conftest import build_config

KINDS = ["mha", "gqa", "mqa", "diff", "mla", "mfa", "tpa", "sas"]


def base_config(**changes: object) -> RunConfig:
    """Return a base in which a step of the MLP width changes the cost by less than one percent."""
    sizes: dict[str, object] = {
        "model__num_layers": 3,
        "model__hidden_size": 640,
        "model__ffn_hidden_size": 1728,
        "attention__num_heads": 8,
        "attention__head_dim": 80,
    }
    return build_config(**{**sizes, **changes})


def test_width_compensates_for_fewer_key_value_heads() -> None:
    base = build_config()
    candidate = build_config(attention__kind="gqa", attention__num_kv_heads=2, model__ffn_hidden_size=8)
    found = match(base, candidate, axis="params", free=(MLP,))
    # Parameters saved per layer: 36 · 6 · 2 · 4 = 1728 = 108 · 16.
    assert found.config.model.ffn_hidden_size == 104 + 16
    assert found.ratios["params"] == 1
    assert found.ratios["kv"] == pytest.approx(1 / 3)
    assert found.changes == {MLP: (8, 120)}
    assert found.config.attention == candidate.attention
    assert candidate.model.ffn_hidden_size == 8


def test_a_search_over_too_many_values_is_refused() -> None:
    base = base_config(attention__num_heads=2**30)
    with pytest.raises(
        FieldError, match=r"^attention.num_heads=1073741824: has 8,589,934,592 possible values up"
    ):
        match(base, base, axis="kv", free=("attention.num_heads",))


def test_each_rank_has_a_multiple_of_eight_at_every_tensor_parallel_size() -> None:
    base = base_config()
    _, variant = build_variant(base, "mqa")
    found = match(base, variant, axis="params", degrees=Degrees(tensor=(1, 2, 4)))
    assert found.config.model.ffn_hidden_size % 32 == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", COUNTED_AXES)
def test_every_kind_matches_the_base_on_every_axis(axis: str, kind: str) -> None:
    base = base_config(attention__kind="gqa", attention__num_kv_heads=4)
    degrees = Degrees(tensor=(1, 2, 4))
    name, variant = build_variant(base, kind)
    found = match(base, variant, axis=axis, degrees=degrees)
    assert name == found.config.attention.kind == kind
    target, costs = counted_costs(base), counted_costs(found.config)
    assert abs(costs[axis] / target[axis] - 1) <= 0.01
    assert found.ratios == {cost: costs[cost] / target[cost] for cost in COUNTED_AXES}
    degrees.check(found.config)
    for field, (before, after) in found.changes.items():
        section, attribute = field.split(".")
        assert getattr(getattr(found.config, section), attribute) == after != before
    if axis == "kv":
        # Fields without effect on the cache are solved for equal parameters.
        assert abs(costs["params"] / target["params"] - 1) <= 0.01


CONTROLS: dict[str, dict[str, object]] = {
    "one block": {"head_expansion": 1},
    "linear": {"head_activation": "none", "feature_activation": "none"},
    "reparametrized": {
        "head_expansion": 1,
        "kernel_size": 1,
        "head_activation": "none",
        "simulation_bias": False,
        "simulate_features": False,
    },
    "value path": {
        "simulate_query_heads": False,
        "simulate_key_heads": False,
        "simulate_features": False,
    },
    "rotary before": {"rotary": "before"},
}
MODIFIERS: dict[str, dict[str, object]] = {
    "elementwise gate": {"output_gate": "elementwise"},
    "headwise gate": {"output_gate": "headwise"},
    "output norm": {"output_norm": True},
    "QK-norm": {"qk_norm": True},
    "knocking heads": {"knocking_heads": True},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("sas", name) for name in CONTROLS),
        *itertools.product(("mha", "diff", "mla", "sas"), MODIFIERS),
    ],
)
def test_every_control_and_modifier_matches_the_base(kind: str, name: str) -> None:
    base = base_config()
    _, variant = build_variant(base, kind)
    fields = {f"attention.{field}": value for field, value in (CONTROLS | MODIFIERS)[name].items()}
    variant = variant.replaced(fields)
    for axis in COUNTED_AXES:
        if axis == "kv":  # controls and modifiers have no effect on it
            continue
        found = match(base, variant, axis=axis, free=(MLP,)).config
        target, costs = counted_costs(base), counted_costs(found)
        assert abs(costs[axis] / target[axis] - 1) <= 0.01
        assert found.attention == variant.attention


def test_match_has_the_mlp_width_nearest_to_the_base() -> None:
    base = base_config()
    _, variant = build_variant(base, "tpa")
    found = match(base, variant, axis="params")
    drift = abs(found.config.model.ffn_hidden_size / 1728 - 1)
    for heads in range(1, 65):
        try:
            other = match(
                base, variant.replaced({"attention.num_heads": heads}), axis="params", free=(MLP,)
            ).config
        except UserError:
            continue
        assert round(abs(other.model.ffn_hidden_size / 1728 - 1), 2) >= round(drift, 2), heads


def test_depth_is_solved_for_if_the_mlp_width_is_not_enough() -> None:
    base = base_config(data__sequence_length=4096)
    _, variant = build_variant(base, "sas")
    with pytest.raises(UserError, match="without any MLP"):
        match(base, variant, axis="flops", free=(MLP,))
    found = match(base, variant, axis="flops")
    assert found.config.model.num_layers < 3
    assert abs(found.ratios["flops"] - 1) <= 0.01


def test_error_states_that_heads_are_not_divisible() -> None:
    base = base_config()
    _, variant = build_variant(base, "sas")
    with pytest.raises(UserError) as caught:
        match(base, variant, axis="params", degrees=Degrees(tensor=(1, 16)))
    assert str(caught.value) == (
        "attention.kind=sas: no choice of model.num_layers, model.ffn_hidden_size is valid for "
        "parallel.tensor=[1, 16] and context=[1]; other choices are invalid, for example: "
        "attention.num_heads=8: must be divisible by parallel.tensor=16, the ranks that share the heads; "
        "set parallel.tensor to one of [1, 2, 4, 8]"
    )


def test_error_states_that_context_parallel_size_does_not_divide_the_heads() -> None:
    base = base_config()
    _, variant = build_variant(base, "gqa")
    with pytest.raises(UserError, match="must divide the 8 heads"):
        match(base, variant, axis="params", degrees=Degrees(context=(3,)))
    _, simulated = build_variant(base, "sas")  # 24 heads
    assert match(base, simulated, axis="params", degrees=Degrees(context=(3,))).config


def test_error_states_the_nearest_match_and_remedies() -> None:
    base = build_config(model__ffn_hidden_size=100)
    with pytest.raises(UserError) as caught:
        match(base, base, axis="params", free=(MLP,), tolerance=0.001)
    assert str(caught.value) == (
        "attention.kind=mha: the nearest match in params is model.ffn_hidden_size=96, with a difference of "
        "-1.4%, more than 0.1% (model.ffn_hidden_size has steps of 8 = 8 × tensor-parallel sizes); free more "
        "fields (attention.num_heads, attention.head_dim, model.num_layers), require fewer parallel sizes, "
        "or use a larger base"
    )


def test_unsupported_field_is_refused() -> None:
    base = build_config()
    with pytest.raises(
        FieldError, match=r"--free=attention\.dropout: cannot be solved for .* attention\.head_dim"
    ):
        match(base, base, axis="params", free=("attention.dropout",))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    width=st.integers(100, 2000),
    kind=st.sampled_from(["gqa", "mqa", "mla", "sas"]),
    tensor=st.sampled_from([1, 2, 4]),
    axis=st.sampled_from(["params", "flops"]),
)
def test_no_other_multiple_is_nearer(width: int, kind: str, tensor: int, axis: str) -> None:
    base = base_config(model__ffn_hidden_size=width)
    _, variant = build_variant(base, kind)
    try:
        found = match(
            base, variant, axis=axis, free=(MLP,), degrees=Degrees(tensor=(tensor,)), tolerance=1e9
        ).config
    except UserError as error:
        if "without any MLP" not in str(error):
            raise
        return
    step = 8 * tensor

    def distance(config: RunConfig) -> int:
        return abs(counted_costs(config)[axis] - counted_costs(base)[axis])

    solved = found.model.ffn_hidden_size
    assert solved % step == 0
    for other in (solved - step, solved + step):
        if other > 0:
            assert distance(found) <= distance(found.replaced({MLP: other}))


def test_depth_alone_can_be_solved_for() -> None:
    base = base_config()
    found = match(base, base.replaced({DEPTH: 1}), axis="params", free=(DEPTH,))
    assert found.changes == {DEPTH: (1, 3)}
    assert found.config.model == base.model


def test_solved_head_count_is_divisible_by_every_tensor_parallel_size() -> None:
    base = base_config()
    _, variant = build_variant(base, "tpa")
    found = match(base, variant, axis="params", degrees=Degrees(tensor=(1, 3, 4), context=(1,)))
    assert found.config.attention.num_heads % 12 == 0
    for tensor, context in itertools.product((1, 3, 4), (1,)):
        check_context_parallel(found.config.attention, tensor, context)


def test_value_of_the_config_is_a_valid_choice_for_any_multiple() -> None:
    base = base_config(attention__head_dim=12)
    found = match(base, base, axis="kv")
    assert found.changes == {}
    assert found.ratios == {"params": 1, "flops": 1, "kv": 1}
