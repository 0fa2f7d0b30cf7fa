"""The replacements for TransformerEngine: norms, and rotary embeddings in forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout
from tests.tolerances import assert_near


def fused_and_unfused(
    rotary_dim: int, contiguous: bool, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    in_layout(ParallelConfig())
    torch.manual_seed(3)
    source = torch.randn(7, 3, 5, 12, dtype=dtype)
    if not contiguous:
        source = torch.randn(3, 5, 12, 7, dtype=dtype).permute(3, 0, 1, 2)
    angles, output_gradient = RotaryEmbedding(rotary_dim, 1.0)(7), torch.randn(7, 3, 5, 12, dtype=dtype)
    results = []
    for fused in (True, False):
        config = TransformerConfig(
            num_layers=1, hidden_size=12, num_attention_heads=1, apply_rope_fusion=fused
        )
        heads = source.clone().requires_grad_()
        rotated = rope_utils.apply_rotary_pos_emb(heads, angles, config)
        rotated.backward(output_gradient)
        results.append((rotated.detach(), heads.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("rotary_dim", [12, 8, 2])
def test_apply_rope_equals_the_unfused_form_of_megatron_core(
    ranks: Any, rotary_dim: int, contiguous: bool, dtype: torch.dtype
) -> None:
    [((rotated, gradient), (expected, expected_gradient))] = ranks(1).run(
        fused_and_unfused, rotary_dim, contiguous, dtype
    )
    assert_near(rotated, expected, dtype, "rotated heads")
    assert_near(gradient, expected_gradient, dtype, "gradient")


def test_an_existing_fused_kernel_is_not_replaced(ranks: Any) -> None:
    [is_kept] = ranks(1).run(install_with_a_kernel)
    assert is_kept


def install_with_a_kernel() -> bool:
    from megatron.core.models.common.embeddings import rope_utils

    from sas_megatron.platform.transformer_engine_fallbacks import install_fused_rope

    ours, kernel = rope_utils.fused_apply_rotary_pos_emb, lambda *_args: None
    rope_utils.fused_apply_rotary_pos_emb = kernel
    try:
        install_fused_rope()
        return rope_utils.fused_apply_rotary_pos_emb is kernel
    finally:
        rope_utils.fused_apply_rotary_pos_emb = ours


def _norm_marks(normalization: str, sequence_parallel: bool) -> dict[str, tuple[bool, int]]:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sas_megatron.platform.transformer_engine_fallbacks import ReplicatedNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=20,
        num_attention_heads=2,
        normalization=normalization,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        layernorm_epsilon=0.25,
    )
    norm = ReplicatedNorm(config, 20, eps=config.layernorm_epsilon)
    x = torch.arange(20.0, dtype=torch.float64)
    centered = x - x.mean() if normalization == "LayerNorm" else x
    expected = centered / (centered.square().mean() + 0.25).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    return {
        name: (parameter.sequence_parallel, parameter.numel()) for name, parameter in norm.named_parameters()
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_weights_are_marked_for_sequence_parallelism(ranks: Any, sequence_parallel: bool) -> None:
    mark = (sequence_parallel, 20)
    assert ranks(1).run(_norm_marks, "RMSNorm", sequence_parallel) == [{"weight": mark}]
    assert ranks(1).run(_norm_marks, "LayerNorm", sequence_parallel) == [{"weight": mark, "bias": mark}]
