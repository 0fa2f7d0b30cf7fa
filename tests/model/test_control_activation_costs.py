"""The counted bytes of activations: controls on SAS, attention without rotary embeddings, padded values."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.costs.activations import count_activation_bytes
from tests import small_attentions as small
from tests.model.kept_activations import simulated_kept_bytes
from tests.run_configs import small_config
from tests.selection import cases

SAS = {**small.SAS, "head_expansion": 2}
GROUPED = {**small.SAS_GROUPED, "head_expansion": 2}
WITHOUT_HEADS = {f"simulate_{name}_heads": False for name in ("query", "key", "value")}
UNROTATED = {**SAS, "rotary": "none", "simulate_features": False, "exchange": "all_to_all"}
ALONE: dict[str, Any] = {}
TENSOR_2 = {"tensor": 2}
RECOMPUTED = {"recompute": "selective", "recompute_modules": ["attention"]}
SIMULATION_RECOMPUTED = {"recompute": "selective", "recompute_modules": ["simulation"]}

# Attention, `parallel`, further fields of `training`. The microbatch has two sequences unless stated. Without
# rotary embeddings, heads may be views of projected columns, which count once, or copies.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gelu": ({**SAS, "head_activation": "gelu", "feature_activation": "gelu"}, ALONE, {}),
    "gelu, gather": ({**GROUPED, "head_activation": "gelu", "exchange": "gather"}, TENSOR_2, {}),
    "linear": ({**SAS, "head_activation": "none", "feature_activation": "none"}, ALONE, {}),
    "rsqrt": ({**SAS, "aggregation": "rsqrt"}, ALONE, {}),
    "before": ({**GROUPED, "rotary": "before"}, ALONE, {}),
    "before, without features": ({**SAS, "rotary": "before", "simulate_features": False}, ALONE, {}),
    "before, features alone": ({**SAS, **WITHOUT_HEADS, "rotary": "before"}, ALONE, {}),
    "before, recomputed": ({**SAS, "rotary": "before"}, ALONE, SIMULATION_RECOMPUTED),
    "before, gather": ({**GROUPED, "rotary": "before", "exchange": "gather"}, TENSOR_2, {}),
    "before, all to all": ({**SAS, "rotary": "before", "exchange": "all_to_all"}, TENSOR_2, {}),
    **{
        f"sas without rotary, all to all, {backend}": (
            {
                **SAS,
                "rotary": "none",
                "simulate_features": False,
                "exchange": "all_to_all",
                "backend": backend,
            },
            TENSOR_2,
            {},
        )
        for backend in ("fused", "auto", "unfused")
    },
    "sas without rotary, all to all, attention recomputed": (
        UNROTATED,
        TENSOR_2,
        RECOMPUTED,
    ),
    "sas without rotary, one sequence": (
        UNROTATED,
        TENSOR_2,
        {"micro_batch_size": 1},
    ),
    "sas without rotary, values alone": (
        {**SAS, **WITHOUT_HEADS, "simulate_value_heads": True, "rotary": "none", "simulate_features": False},
        ALONE,
        {},
    ),
    "mha without rotary, chunked": ({**small.MHA, "rotary": "none"}, ALONE, {}),
    "mha without rotary, fused": ({**small.MHA, "rotary": "none", "backend": "fused"}, ALONE, {}),
    "gqa without rotary": ({**small.GQA, "rotary": "none"}, ALONE, {}),
    "gqa without rotary, context 2": ({**small.GQA, "rotary": "none"}, {"context": 2}, {}),
    "gqa without rotary, recomputed": ({**small.GQA, "rotary": "none"}, ALONE, RECOMPUTED),
    "mqa without rotary, tensor 2": ({**small.MQA, "rotary": "none"}, TENSOR_2, {}),
    "mfa without rotary": ({**small.MFA, "rotary": "none"}, ALONE, {}),
    "mla without rotary": ({**small.MLA, "rotary": "none"}, ALONE, {}),
    "tpa without rotary": ({**small.TPA, "rotary": "none"}, ALONE, {}),
    "tpa without rotary, queries whole": ({**small.TPA_UNFACTORED_QUERIES, "rotary": "none"}, ALONE, {}),
    "tpa without rotary, queries whole, fused": (
        {**small.TPA_UNFACTORED_QUERIES, "rotary": "none", "backend": "fused"},
        ALONE,
        {},
    ),
    "tpa without rotary, queries whole, one sequence": (
        {**small.TPA_UNFACTORED_QUERIES, "rotary": "none"},
        ALONE,
        {"micro_batch_size": 1},
    ),
    # Results of one feature are views of the padded tensor that core attention computes.
    "mla, values of one feature": ({**small.MLA, "value_head_dim": 1, "backend": "fused"}, ALONE, {}),
    "mla, values of one feature, gate, dropout": (
        {**small.MLA, "value_head_dim": 1, "output_gate": "elementwise", "dropout": 0.1},
        TENSOR_2,
        {},
    ),
}
# The others repeat a condition that these cover.
REPEATED = {
    "linear",
    "rsqrt",
    "before, gather",
    "sas without rotary, all to all, unfused",
    "mha without rotary, fused",
    "mla without rotary",
    "tpa without rotary",
}


@pytest.mark.parametrize("case", cases(CASES, default=CASES.keys() - REPEATED))
def test_the_count_equals_the_bytes_that_a_rank_saves(separate_process: Any, case: str) -> None:
    attention, parallel, training = CASES[case]
    batch = {"num_steps": 9, "global_batch_size": 4, "micro_batch_size": 2}
    config = small_config(
        attention=attention, parallel=parallel, training={**batch, **training}, model={"num_layers": 1}
    )
    assert separate_process(simulated_kept_bytes, config) == count_activation_bytes(config, device="cpu")
