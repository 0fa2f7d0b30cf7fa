"""Identity initialization: SAS starts as Megatron-core's attention, and differs from it after training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.attention import parse_attention
from sas_megatron.config.parallel import ParallelConfig
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.tolerances import assert_near

SAS = {
    "kind": "sas",
    "num_heads": 4,
    "head_dim": 6,
    "head_expansion": 3,
    "simulated_head_dim": 10,
    "initialization": "identity",
}


def megatron_layer(num_kv_heads: int) -> torch.nn.Module:
    """Build Megatron-core's `SelfAttention` with its own unfused core attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=layer_case.HIDDEN_SIZE,
        num_attention_heads=4,
        num_query_groups=num_kv_heads,
        kv_channels=6,
        add_bias_linear=False,
        params_dtype=torch.float64,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=False,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.self_attention
    return build_module(spec, config=config, layer_number=1)


def initialized_layer(num_kv_heads: int) -> torch.nn.Module:
    """Build SAS with identity initialization."""
    from sas_megatron.model.initialization import initialize_simulation

    case = LayerCase.of(num_kv_heads=num_kv_heads, **SAS)
    layer = layer_case.build_layer(case, 1)
    config = small_config(attention={**SAS, "num_kv_heads": num_kv_heads}, training={"seed": 5})
    initialize_simulation(layer, config, name_of=lambda name: name)
    return layer


def share_projections(*layers: torch.nn.Module) -> None:
    with torch.no_grad():
        for layer in layers:
            for name in ("linear_qkv", "linear_proj"):
                weight = getattr(layer, name).weight
                weight.copy_(layer_case.drawn(name, weight.shape, torch.float64))


def run(layer: torch.nn.Module, rotary: torch.Tensor, mask: torch.Tensor | None) -> tuple[Any, ...]:
    hidden = layer_case.layer_input(torch.float64).requires_grad_()
    output, _ = layer(hidden, mask, rotary_pos_emb=rotary)
    output.backward(layer_case.output_gradient(torch.float64))
    return output.detach(), hidden.grad, layer.linear_qkv.weight.grad, layer.linear_proj.weight.grad


def both_layers(num_kv_heads: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    in_layout(ParallelConfig())
    ours, theirs = initialized_layer(num_kv_heads), megatron_layer(num_kv_heads)
    share_projections(ours, theirs)
    rotary = layer_case.rotary_angles(parse_attention({**SAS, "num_kv_heads": num_kv_heads}))
    length = layer_case.LENGTH
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return run(ours, rotary, None), run(theirs, rotary, mask)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_identity_equals_megatrons_self_attention_forward_and_backward(ranks: Any, num_kv_heads: int) -> None:
    [(ours, theirs)] = ranks(1).run(both_layers, num_kv_heads)
    for name, mine, expected in zip(
        ("output", "input gradient", "qkv gradient", "projection gradient"), ours, theirs, strict=True
    ):
        assert_near(mine, expected, torch.float64, name)


def trained_layer() -> dict[str, torch.Tensor]:
    """Train 20 steps toward a fixed random target, and return the heads."""
    in_layout(ParallelConfig())
    layer = initialized_layer(2)
    share_projections(layer)
    rotary = layer_case.rotary_angles(layer.attention)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    target = layer_case.output_gradient(torch.float64)
    for _ in range(20):
        optimizer.zero_grad()
        output, _ = layer(layer_case.layer_input(torch.float64), None, rotary_pos_emb=rotary)
        (output - target).square().mean().backward()
        optimizer.step()
    query, key, value = layer.project(layer_case.layer_input(torch.float64), None, is_decoding=False)
    return {"query": query.detach(), "key": key.detach(), "value": value.detach()}


def test_identity_becomes_sas_within_twenty_steps(ranks: Any) -> None:
    [heads] = ranks(1).run(trained_layer)
    for name, heads_SBMD in heads.items():
        blocks = heads_SBMD.unflatten(2, (3, -1))
        scale = heads_SBMD.abs().mean()
        for other in (1, 2):
            drift = (blocks[:, :, 0] - blocks[:, :, other]).abs().mean() / scale
            assert drift > 1e-3, f"{name}: block {other} is still a copy of block 0 ({drift:.1e})"
    for name in ("query", "key"):
        extra = heads[name][..., 6:].abs().mean()
        assert extra > 1e-3, f"{name}: the simulated features are still zero ({extra:.1e})"
