"""Modifiers: published code, exact starts, neutral values, sums of gradients, and what is rejected."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from sas_megatron.attention.sas import simulation_kernels
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import KINDS as ALL_KINDS
from sas_megatron.config.attention_kinds import VariantNames
from sas_megatron.config.errors import FieldError
from sas_megatron.config.parallel import ParallelConfig
from tests import small_attentions as small
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.attention.test_simulated_layer import check
from tests.model.model_parts import initial_weights, joined_weights
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.tolerances import assert_near


def output_and_weights(case: LayerCase) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output of a layer with drawn weights, and these weights."""
    in_layout(ParallelConfig())
    layer = layer_case.build_layer(case, 1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(layer_case.drawn(name, parameter.shape, case.dtype))
        angles = layer_case.rotary_angles(case.config())
        output, _ = layer(layer_case.layer_input(case.dtype), None, rotary_pos_emb=angles)
    return output, {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def test_norms_and_elementwise_gates_equal_those_of_qwen3_next(ranks: Any) -> None:
    """transformers' `Qwen3NextAttention` has QK-norm before rotary embeddings, and gates before W_O."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    # These layers compute norms and angles in float32.
    fields = {**small.GQA, "qk_norm": True, "output_gate": "elementwise"}
    case = LayerCase.of(dtype=torch.float32, **fields)
    [(actual, weights)] = ranks(1).run(output_and_weights, case)
    heads, groups, width, hidden = 4, 2, 6, layer_case.HIDDEN_SIZE
    config = qwen.Qwen3NextConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        attn_implementation="eager",
    )
    theirs = qwen.Qwen3NextAttention(config, 0)
    grouped = weights["linear_qkv.weight"].view(groups, heads // groups + 2, width, hidden)
    query = grouped[:, :-2].reshape(heads, width, hidden)
    gate = weights["core_attention.modifiers.output_gate.weight"].view(heads, width, hidden)
    # Each head's query is followed by its gate. The scale of their norms is 1 + weight.
    state = {
        "q_proj.weight": torch.cat([query, gate], dim=1).flatten(0, 1),
        "k_proj.weight": grouped[:, -2].flatten(0, 1),
        "v_proj.weight": grouped[:, -1].flatten(0, 1),
        "o_proj.weight": weights["linear_proj.weight"],
        "q_norm.weight": weights["core_attention.modifiers.query_norm"] - 1,
        "k_norm.weight": weights["core_attention.modifiers.key_norm"] - 1,
    }
    theirs.load_state_dict(state)
    hidden_BSH = layer_case.layer_input(torch.float32).transpose(0, 1)
    length = hidden_BSH.shape[1]
    rope = qwen.Qwen3NextRotaryEmbedding(config)(hidden_BSH, torch.arange(length)[None])
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = theirs(hidden_BSH, rope, mask)
    assert_near(actual, expected.transpose(0, 1), torch.float32, "output")


def loss_gradients(config: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of a newly built model, and the gradients of a loss by parameter name."""
    from sas_megatron.model.assembly import build_gpt_chunks
    from tests.model.model_parts import random_tokens

    in_layout(config.parallel)
    (model,) = build_gpt_chunks(config)
    tokens = random_tokens(config)
    logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", [small.GQA, small.MLA, small.SAS_GROUPED], ids=lambda x: x["kind"])
def test_knocking_heads_start_as_exactly_the_identity(ranks: Any, attention: small.Attention) -> None:
    plain, knocking = (
        ranks(1).run(loss_gradients, small_config(attention={**attention, "knocking_heads": switch}))[0]
        for switch in (False, True)
    )
    assert torch.equal(knocking[0], plain[0])
    for name, gradient in plain[1].items():
        assert torch.equal(knocking[1][name], gradient), name
    added = knocking[1].keys() - plain[1].keys()
    assert len(added) == 3 * 2
    assert all(knocking[1][name].abs().max() > 0 for name in added), "the maps must be trained"


def test_weights_of_modifiers_start_as_published(ranks: Any) -> None:
    config = small_config(
        attention={**small.MODIFIERS, "kind": "diff", "num_heads": 8, "head_dim": 32},
        model={"num_layers": 1, "hidden_size": 300, "ffn_hidden_size": 8, "init_std": 0.05},
    )
    weights = joined_weights(ranks(1).run(initial_weights, config))
    prefix = "decoder.layers.0.self_attention."
    local = {name.removeprefix(prefix): weight for name, weight in weights.items() if prefix in name}
    modifiers = "core_attention.modifiers."
    for name in ("query_norm", "key_norm", "output_norm"):
        assert torch.equal(local[modifiers + name], torch.ones(32)), name
    assert torch.equal(local[modifiers + "knocking.up"], torch.eye(32))
    assert torch.equal(local[modifiers + "knocking.down"], torch.eye(32))
    assert torch.equal(local[modifiers + "knocking.gate"], torch.zeros(32, 32))
    for name, rows in ((modifiers + "output_gate.weight", 8 * 32), ("linear_lambda.weight", 8)):
        weight = local[name]
        assert weight.shape == (rows, 300)
        assert abs(float(weight.std()) / 0.05 - 1) < 4 / (2 * weight.numel()) ** 0.5, name


def output_of_the_parts(case: LayerCase) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return the output of a layer, the same computed from its parts, and the names of its weights."""
    in_layout(ParallelConfig())
    layer: Any = layer_case.build_layer(case, 1)
    hidden, angles = layer_case.layer_input(case.dtype), layer_case.rotary_angles(case.config())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(layer_case.drawn(name, parameter.shape, case.dtype))
        output, _ = layer(hidden, None, rotary_pos_emb=angles)
        rope = layer.rotary_angles(angles, hidden, None)
        query, *kept = layer.project(hidden, rope, is_decoding=False)
        key, value = layer.expand(kept, rope, is_decoding=False)
        context = layer.reduce_heads(layer.core_attention(query, key, value, None), hidden)
        expected, _ = layer.linear_proj(context)
    return output, expected, [name for name, _ in layer.named_parameters()]


NEUTRAL = {"qk_norm": False, "knocking_heads": False, "output_norm": False, "output_gate": "none"}


@pytest.mark.parametrize(
    "attention",
    [small.MHA, small.GQA, small.MQA, small.DIFF, small.MLA, small.MFA, small.TPA, small.SAS],
    ids=lambda x: x["kind"],
)
def test_neutral_values_are_the_attention_without_modifiers_bit_for_bit(
    ranks: Any, attention: small.Attention
) -> None:
    case = LayerCase.of(dtype=torch.float32, **attention, **NEUTRAL)
    [(output, expected, names)] = ranks(1).run(output_of_the_parts, case)
    assert torch.equal(output, expected)
    assert not any("modifiers" in name for name in names)
    assert LayerCase.of(**attention).config() == case.config()


def _without_sum(missing: str, case: LayerCase) -> Any:
    from sas_megatron.attention import modifiers

    kept = getattr(modifiers, missing)
    without = {
        "sum_gradients_over": lambda _group, weights: tuple(weights),
        "sum_gradients_over_tokens": lambda weights, **_layout: tuple(weights),
    }
    setattr(modifiers, missing, without[missing])
    try:
        return layer_case.on_rank(case, 2)
    finally:
        setattr(modifiers, missing, kept)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({**small.GQA, "qk_norm": True}, "sum_gradients_over"),
        ({**small.MQA, "knocking_heads": True}, "sum_gradients_over"),
        ({**small.MLA, "output_norm": True}, "sum_gradients_over"),
        ({**small.TPA, "output_gate": "headwise"}, "sum_gradients_over_tokens"),
        (small.DIFF, "sum_gradients_over_tokens"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else value,
)
def test_a_missing_sum_over_ranks_is_detected(ranks: Any, fields: small.Attention, missing: str) -> None:
    case = LayerCase.of(sequence_parallel=True, **fields)
    with pytest.raises(AssertionError, match=r"differs between rank 0 and rank 1"):
        layer_case.joined(case, ranks(2).run(_without_sum, missing, case))


class OwnRotaryConfig(AttentionConfig):
    """A variant from outside the package with its own rotary embeddings."""

    uses_model_rotary = False
    kind: str = "own_rotary"


def test_qk_norm_is_rejected_for_a_layer_that_cannot_rotate_normalized_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sas_megatron.attention.layer import resolve_layer

    names = VariantNames("", "", "sas_megatron.attention.gqa.layer:GroupedQueryAttention")
    monkeypatch.setitem(ALL_KINDS, "own_rotary", names)
    resolve_layer(OwnRotaryConfig(num_heads=4, head_dim=6))
    with pytest.raises(
        FieldError,
        match=r"attention\.qk_norm=True: is not supported by attention\.kind=own_rotary, whose .*; "
        r"set attention\.qk_norm=false, or use another kind",
    ):
        resolve_layer(OwnRotaryConfig(num_heads=4, head_dim=6, qk_norm=True))


def test_rotary_embeddings_outside_of_the_fused_kernels_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    simulation_kernels._log_once.cache_clear()
    attention = SimulatedAttentionConfig(num_heads=4, head_dim=6, kernel="fused", qk_norm=True)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            simulation_kernels.build_simulation_kernels(attention, dtype=torch.bfloat16)
    assert caplog.messages == [
        "attention.qk_norm=true: rotary embeddings follow the norm, outside of the fused kernels"
    ]


def test_fused_kernels_compute_the_definition_with_modifiers(ranks: Any) -> None:
    fields = {**small.SAS_GROUPED, **small.MODIFIERS, "kernel": "fused", "exchange": "gather"}
    check(ranks, LayerCase.of(dtype=torch.float32, **fields), 1)
