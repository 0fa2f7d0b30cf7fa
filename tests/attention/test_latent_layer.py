"""Latent attention uses the config's θ, the scale of D + R features, and RMSNorm for its latents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.attention.test_attention_properties import VARIANTS
from tests.rank_pool import in_layout
from tests.run_configs import small_config

MLA = VARIANTS["mla"]


def built_layer(model_fields: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary frequencies, the scale and the norms of the first layer's attention, on a rank."""
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(ParallelConfig())
    (model,) = build_gpt_chunks(small_config(attention=MLA, model=model_fields))
    attention = model.decoder.layers[0].self_attention
    return {
        "frequencies": attention.rotary_pos_emb.inv_freq,
        "scale": attention.core_attention.backend.scale,
        "norms": {type(attention.q_layernorm).__name__, type(attention.kv_layernorm).__name__},
        "epsilons": {attention.q_layernorm.eps, attention.kv_layernorm.eps},
    }


@pytest.mark.parametrize("base", [10000, 500])
def test_rotary_frequencies_have_the_models_base(ranks: Any, base: int) -> None:
    (layer,) = ranks(1).run(built_layer, {"rotary_base": base})
    assert torch.allclose(layer["frequencies"], base ** (-torch.arange(0, 6, 2) / 6))


def test_scores_are_scaled_by_the_full_width_of_queries(ranks: Any) -> None:
    (layer,) = ranks(1).run(built_layer, {})
    assert layer["scale"] == pytest.approx(1 / math.sqrt(5 + 6))


def test_latents_have_rmsnorm_for_any_norm_of_the_model(ranks: Any) -> None:
    (layer,) = ranks(1).run(built_layer, {"normalization": "layernorm", "norm_epsilon": 1e-3})
    assert layer["norms"] == {"RMSNorm"}
    assert layer["epsilons"] == {1e-3}
