"""Random configs are either valid or raise an error that names a field and a remedy."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sas_megatron.config.attention import resolve_kind
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import build_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activations import count_kv_cache_bytes
from sas_megatron.costs.flops import count_forward_flops
from sas_megatron.costs.parameters import count_parameters
from tests.run_configs import small_tree

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24]) | st.integers(-3, 40)
# Values of the field's type and others: zero, negative, indivisible, of another type, null.
VALUES = NUMBERS | st.none() | st.booleans() | st.sampled_from([0.5, -1.0, "auto", "fused", "", [], {}])


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    attention: dict[str, Any] = {"kind": kind, "num_heads": 4, "head_dim": 6}
    likely = draw(st.integers(0, 4)) * 6
    for field, about in resolve_kind(kind).model_fields.items():
        if field != "kind" and (
            draw(st.integers(0, 29)) < likely or field in attention or about.is_required()
        ):
            choices = st.sampled_from([2, 4, 8]) if draw(st.integers(0, 4)) else NUMBERS | VALUES
            attention[field] = draw(choices)
    tree = small_tree(attention=attention)
    for section, model in RunConfig.model_fields.items():
        fields = getattr(model.annotation, "model_fields", {})
        for field in fields if section in ("model", "parallel", "training", "data") else ():
            if draw(st.integers(0, 599)) < likely:
                tree.setdefault(section, {})[field] = draw(NUMBERS | VALUES)
    return tree


SWEEP = settings(
    max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def outcome(tree: dict[str, Any]) -> RunConfig | UserError:
    """Build a config; return it or its error."""
    try:
        return build_run_config(tree)
    except UserError as error:
        return error


def check_outcome(result: RunConfig | UserError) -> None:
    if isinstance(result, FieldError):
        assert result.field
        assert result.rule
        assert result.remedy
    elif isinstance(result, UserError):
        assert all("." in line.split(":")[0] for line in str(result).splitlines()), result
    else:
        for terms in (count_parameters(result), count_forward_flops(result), count_kv_cache_bytes(result)):
            assert all(isinstance(count, int) and count >= 0 for count in terms.values()), terms


def test_any_config_is_valid_or_raises_a_user_error() -> None:
    legal = []

    @SWEEP
    @given(tree=trees())
    def draw(tree: dict[str, Any]) -> None:
        result = outcome(tree)
        legal.append(isinstance(result, RunConfig))
        check_outcome(result)

    draw()
    # Both outcomes are drawn.
    assert 0.02 < sum(legal) / len(legal) < 0.9
