"""Rotary positions in one pass equal Megatron-core's own, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout
from tests.tolerances import assert_near


def both(rotary_dim: int, contiguous: bool, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    in_layout(ParallelConfig())
    torch.manual_seed(3)
    source = torch.randn(7, 3, 5, 12, dtype=dtype)
    if not contiguous:
        source = torch.randn(3, 5, 12, 7, dtype=dtype).permute(3, 0, 1, 2)
    angles, gradient = RotaryEmbedding(rotary_dim, 1.0)(7), torch.randn(7, 3, 5, 12, dtype=dtype)
    results = []
    for fused in (True, False):
        config = TransformerConfig(
            num_layers=1, hidden_size=12, num_attention_heads=1, apply_rope_fusion=fused
        )
        heads = source.clone().requires_grad_()
        turned = rope_utils.apply_rotary_pos_emb(heads, angles, config)
        turned.backward(gradient)
        results.append((turned.detach(), heads.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("rotary_dim", [12, 8, 2])
def test_one_pass_equals_megatrons_own(
    ranks: Any, rotary_dim: int, contiguous: bool, dtype: torch.dtype
) -> None:
    [((turned, gradient), (expected, expected_gradient))] = ranks(1).run(both, rotary_dim, contiguous, dtype)
    assert_near(turned, expected, dtype, "rotated heads")
    assert_near(gradient, expected_gradient, dtype, "gradient")


def test_transformer_engines_kernel_is_left_in_place(ranks: Any) -> None:
    [kept] = ranks(1).run(offer_beside_a_kernel)
    assert kept


def offer_beside_a_kernel() -> bool:
    from megatron.core.models.common.embeddings import rope_utils

    from sas_megatron.platform.rotary import offer_fused_rotary

    ours, kernel = rope_utils.fused_apply_rotary_pos_emb, lambda *_args: None
    rope_utils.fused_apply_rotary_pos_emb = kernel
    try:
        offer_fused_rotary()
        return rope_utils.fused_apply_rotary_pos_emb is kernel
    finally:
        rope_utils.fused_apply_rotary_pos_emb = ours
