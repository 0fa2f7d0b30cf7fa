"""The full model in float64: every layout gives the logits of one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.model.model_parts import joined_logits, logits_part
from tests.run_configs import small_config
from tests.selection import cases
from tests.tolerances import assert_near

ATTENTIONS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": small.GQA,
    "mqa": small.MQA,
    "mla": small.MLA,
    "sas-gather": {**small.SAS, "head_expansion": 2, "exchange": "gather"},
    "sas-all_to_all": {**small.SAS, "exchange": "all_to_all"},
    "sas-grouped-gather": {**small.SAS_GROUPED, "kernel_size": 5, "exchange": "gather"},
    "sas-grouped-all_to_all": {**small.SAS_GROUPED, "head_expansion": 2, "exchange": "all_to_all"},
    "diff": small.DIFF_GROUPED,
    "gqa-modified": {**small.GQA, **small.MODIFIERS},
    "sas-modified": {**small.SAS, **small.MODIFIERS, "output_gate": "headwise"},
    "mfa": small.MFA,
    "tpa": small.TPA,
    "tpa-kv": small.TPA_UNFACTORED_QUERIES,
    "gqa-biased": {**small.GQA, "qkv_bias": True, "qk_norm": True},
    "gqa-unrotated": {**small.GQA, "rotary": "none"},
    "mla-unrotated": {**small.MLA, "rotary": "none"},
    "sas-before": {
        **small.SAS_GROUPED,
        "rotary": "before",
        "head_activation": "gelu",
        "feature_activation": "none",
        "aggregation": "rsqrt",
        "exchange": "all_to_all",
    },
}
# The other parts of the model, so that each is tested in each layout.
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {
        "linear_bias": True,
        "activation": "gelu",
        "normalization": "layernorm",
        "tie_embeddings": True,
    },
    "parallel": {
        "parallel_residual": True,
        "rotary_scaling": "llama3",
        "rotary_scaling_factor": 8.0,
        "rotary_low_frequency_factor": 1.0,
        "rotary_high_frequency_factor": 4.0,
        "rotary_original_length": 24,
    },
}


def config_of(attention: str, parts: str, **parallel: Any) -> RunConfig:
    return small_config(
        attention=ATTENTIONS[attention], model={"num_layers": 4, **PARTS[parts]}, parallel=parallel
    )


# Ordered by layout, since ranks reuse their process groups.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "tensor 4": {"tensor": 4},
    "tensor 4, sequence": {"tensor": 4, "sequence": True},
    "pipeline 2": {"pipeline": 2},
    "pipeline 2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "pipeline 2, first stage short": {"pipeline": 2, "first_stage_layers": 1},
    "context 2": {"context": 2},
    "context 2, pipeline 2": {"context": 2, "pipeline": 2},
    "tensor 2, sequence, pipeline 2 interleaved": {
        "tensor": 2,
        "sequence": True,
        "pipeline": 2,
        "virtual_pipeline": 2,
    },
    "tensor 2, context 2": {"tensor": 2, "context": 2},
}


CASES: dict[str, tuple[str, str, str]] = {
    f"{layout}-{parts}-{attention}": (layout, parts, attention)
    for layout in LAYOUTS
    for parts in PARTS
    for attention in ATTENTIONS
    # Latent attention has its own rotary embeddings, which are not scaled.
    if parts != "parallel" or not attention.startswith("mla")
}
# Every attention on tensor ranks, on context ranks and on both; the other parts of the model in each layout.
DEFAULT = (
    "tensor 2-biased-sas-gather",
    "tensor 2-plain-mla",
    "tensor 2-plain-tpa-kv",
    "tensor 2, sequence-biased-gqa",
    "tensor 2, sequence-plain-mla-unrotated",
    "tensor 2, sequence-plain-sas-grouped-gather",
    "tensor 2, sequence-plain-mla",
    "tensor 2, sequence-biased-mfa",
    "tensor 4-biased-sas-grouped-all_to_all",
    "tensor 4-plain-tpa",
    "tensor 4-plain-gqa-biased",
    "tensor 4-parallel-mha",
    "tensor 4-biased-mqa",
    "tensor 4, sequence-plain-sas-all_to_all",
    "tensor 4, sequence-biased-mha",
    "tensor 4, sequence-plain-gqa",
    "pipeline 2-biased-mha",
    "pipeline 2 interleaved-biased-sas-gather",
    "pipeline 2 interleaved-plain-gqa-modified",
    "pipeline 2 interleaved-parallel-sas-all_to_all",
    "pipeline 2, first stage short-plain-gqa",
    "context 2-plain-gqa",
    "context 2-parallel-gqa-biased",
    "context 2-biased-mla",
    "context 2-plain-sas-all_to_all",
    "context 2-biased-mfa",
    "context 2-plain-tpa-kv",
    "context 2, pipeline 2-biased-mha",
    "context 2, pipeline 2-biased-sas-modified",
    "context 2, pipeline 2-plain-gqa-unrotated",
    "context 2, pipeline 2-plain-sas-grouped-gather",
    "tensor 2, sequence, pipeline 2 interleaved-biased-tpa",
    "tensor 2, sequence, pipeline 2 interleaved-biased-diff",
    "tensor 2, sequence, pipeline 2 interleaved-plain-sas-all_to_all",
    "tensor 2, sequence, pipeline 2 interleaved-biased-sas-before",
    "tensor 2, context 2-biased-mqa",
    "tensor 2, context 2-plain-sas-gather",
    "tensor 2, context 2-biased-sas-grouped-all_to_all",
    "tensor 2, context 2-plain-tpa",
    "tensor 2, context 2-plain-sas-before",
)


@pytest.fixture(scope="module")
def alone(ranks: Any) -> Callable[[str, str], torch.Tensor]:
    """Return a function `(attention, parts)` to the logits of one process."""

    @functools.cache
    def logits(attention: str, parts: str) -> torch.Tensor:
        (result,) = ranks(1).run(logits_part, config_of(attention, parts))
        return result

    return logits


@pytest.mark.parametrize("case", cases(CASES, default=DEFAULT))
def test_every_layout_gives_the_logits_of_one_process(ranks: Any, alone: Any, case: str) -> None:
    layout, parts, attention = CASES[case]
    config = config_of(attention, parts, **LAYOUTS[layout])
    by_rank = ranks(config.parallel.model_size).run(logits_part, config)
    assert_near(joined_logits(by_rank, config.parallel), alone(attention, parts), torch.float64, "logits")


def test_variants_differ_from_each_other(alone: Any) -> None:
    logits = [alone(attention, "plain") for attention in ATTENTIONS]
    for index, one in enumerate(logits):
        assert one.std() > 0.05
        assert not any(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for other in logits[index + 1 :])
