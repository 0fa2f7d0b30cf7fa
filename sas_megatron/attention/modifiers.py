"""The modifiers of attention, which all variants support: each is off by default.

    queries [S, B, M, E], keys [T, B, G, E], values [T, B, G, D] of this rank's heads, from the variant
      -> QK-norm (`qk_norm`): RMSNorm of each query and each key head; then rotary embeddings
      -> knocking heads (`knocking_heads`): a gated map of each value head, the same for all heads
      -> core attention, and for SAS the aggregation of its blocks        [S, B, N, D]
      -> output norm (`output_norm`): RMSNorm of each head
      -> output gate (`output_gate`): a factor σ(X·W), with X the layer's input
      -> output projection

`AttentionLayer.forward` calls them around the methods of a variant, which needs no code for them.

The scales of the norms and the maps of knocking heads are replicated over the tensor ranks. Each rank
uses them for its local heads, so their gradients are partial sums. `AttentionModifiers` passes all of them
through one identity whose backward pass all-reduces the gradients.

The functions below save what their docstrings name, for every layout of their inputs, so that `costs` can
count the bytes exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.distributed.gradient_sums import (
    gather_shared_columns,
    sum_gradients_over,
    sum_gradients_over_tokens,
)

Weights = dict[str, torch.Tensor]


class AttentionModifiers(nn.Module):
    """The weights of an attention layer's modifiers; without modifiers there are none.

    Sources: the gates are G1 of Qiu et al. 2025 (arXiv 2505.06708; `modeling_qwen3.py` of their repository
    qiuzh20/gated_attention projects gates from the layer's normed input, without a separate bias, and applies
    sigmoids before the output projection); knocking heads are equation 9 and section 3.3 of Zhou et al. 2025
    (arXiv 2510.23052); the RMSNorm of queries and keys with one learned scale for all heads, before rotary
    embeddings, is that of Qwen3 (same file); the output norm has one learned scale for all heads, as `subln`
    in the code of Differential Transformer (microsoft/unilm, Diff-Transformer/multihead_diffattn.py).
    """

    def __init__(
        self, attention: AttentionConfig, config: TransformerConfig, *, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__()
        self.attention, self.group, self.epsilon = attention, group, config.layernorm_epsilon
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        width = attention.value_width
        # `initialize_weights` sets the values of all weights.
        if attention.qk_norm:
            self.query_norm = nn.Parameter(torch.empty(attention.query_key_dim, **options))
            self.key_norm = nn.Parameter(torch.empty(attention.query_key_dim, **options))
        if attention.knocking_heads:
            self.knocking = KnockingMaps(width, **options)
        if attention.output_norm:
            self.output_norm = nn.Parameter(torch.empty(width, **options))
        if attention.output_gate == "headwise":
            self.output_gate = HeadColumns(
                config.hidden_size, attention.num_heads, config=config, group=group
            )
        elif attention.output_gate == "elementwise":
            self.output_gate = ColumnParallelLinear(
                config.hidden_size,
                attention.num_heads * width,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=group,
            )

    def forward(self) -> Weights:
        """Return the weights that this rank applies to its local heads, with gradients summed over the ranks.

        Identity in forward; one all-reduce for all of them in backward. DeepSpeed's ZeRO gathers the weights
        of a module while its forward method is called.
        """
        local = dict(self.named_parameters(recurse=False))
        if self.attention.knocking_heads:
            local |= {f"knocking.{name}": weight for name, weight in self.knocking().items()}
        if not local:
            return {}
        return dict(zip(local, sum_gradients_over(self.group, list(local.values())), strict=True))

    def normalize_query(self, query_SBME: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Return queries with RMSNorm over the E features of each head."""
        return normalize_heads(query_SBME, weights["query_norm"], self.epsilon)

    def normalize_key(self, key_TBGE: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Return keys with RMSNorm over the E features of each head."""
        return normalize_heads(key_TBGE, weights["key_norm"], self.epsilon)

    def knock_values(self, value_TBGD: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Return Ṽ = 2·[V·W_up ⊙ σ(V·W_gate)]·W_down for each value head, or the values if this is off."""
        if not self.attention.knocking_heads:
            return value_TBGD
        maps = (weights[f"knocking.{name}"] for name in ("up", "gate", "down"))
        knocked: torch.Tensor = _KnockHeads.apply(value_TBGD, *maps)
        return knocked

    def normalize_output(self, context_SBW: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Return the result of core attention, W = N/P·D, with RMSNorm over each head, or as it is."""
        if not self.attention.output_norm:
            return context_SBW
        heads = context_SBW.unflatten(-1, (-1, self.attention.value_width))
        return normalize_heads(heads, weights["output_norm"], self.epsilon).flatten(2)

    def gate_output(self, context_SBW: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return Y ⊙ σ(X·W) with a gate for each feature or for each head, or Y if this is off.

        Saved for the backward pass: Y and the sigmoids.

        Args:
            context_SBW: Y, [S, B, N/P·D].
            hidden_states: X, the layer's input [S, B, H], or [S/P, B, H] under sequence parallelism.
        """
        if self.attention.output_gate == "none":
            return context_SBW
        if self.attention.output_gate == "elementwise":
            columns, _ = self.output_gate(hidden_states)
            return context_SBW * torch.sigmoid(columns)
        gates_SBN = torch.sigmoid(self.output_gate(hidden_states))
        heads = context_SBW.unflatten(-1, (-1, self.attention.value_width))
        gated: torch.Tensor = (heads * gates_SBN.unsqueeze(-1)).flatten(2)
        return gated


class KnockingMaps(nn.Module):
    """The maps up, gate and down, [D, D], which are applied from the right, as in the paper."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        for name in ("up", "gate", "down"):
            self.register_parameter(name, nn.Parameter(torch.empty(width, width, **options)))

    def forward(self) -> Weights:
        """Return the maps by name."""
        return dict(self.named_parameters())


class HeadColumns(nn.Module):
    """A linear map of hidden states to one column for each head, of which a rank returns its local heads'.

    The weight [N, H] is replicated over the tensor ranks. Each rank computes the columns of all N heads for
    its local tokens: under sequence parallelism, N columns are all-gathered instead of H.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        config: TransformerConfig,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.layout: dict[str, Any] = {"group": group, "sequence_parallel": config.sequence_parallel}
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.empty(num_heads, hidden_size, dtype=config.params_dtype, device=device)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project [S, B, H], or [S/P, B, H] under sequence parallelism, to [S, B, N/P]."""
        (weight,) = sum_gradients_over_tokens([self.weight], **self.layout)
        columns = gather_shared_columns(F.linear(hidden_states, weight), **self.layout)
        group = self.layout["group"]
        local: torch.Tensor = columns.chunk(group.size(), dim=-1)[group.rank()]
        return local


def normalize_heads(heads: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x/√(mean x² + ε)·scale over the last axis, computed in at least float32.

    Saved for the backward pass: the normalized heads before the scale, and the factor of each head.
    """
    normalized: torch.Tensor = _NormalizeHeads.apply(heads, scale, epsilon)
    return normalized


class _NormalizeHeads(torch.autograd.Function):
    """RMSNorm that saves its normalized input, which is never a view of a larger tensor, unlike the input."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
        factor = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
        normalized = (wide * factor).to(heads.dtype)
        ctx.save_for_backward(normalized, factor, scale)
        return normalized * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normalized, factor, scale = ctx.saved_tensors
        wide, scaled = normalized.to(factor.dtype), gradient.to(factor.dtype) * scale
        along = (scaled * wide).mean(dim=-1, keepdim=True)
        of_heads = (factor * (scaled - wide * along)).to(gradient.dtype)
        of_scale = (gradient.to(factor.dtype) * wide).flatten(0, -2).sum(dim=0)
        return of_heads, of_scale.to(scale.dtype), None


class _KnockHeads(torch.autograd.Function):
    """Knocking heads: saves the values, the up-projected values and the sigmoids."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        raised, gates = value @ up, torch.sigmoid(value @ gate)
        ctx.save_for_backward(value, raised, gates, up, gate, down)
        return 2 * ((raised * gates) @ down)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, raised, gates, up, gate, down = ctx.saved_tensors
        doubled = 2 * gradient
        of_product = doubled @ down.T
        of_raised, of_gates = of_product * gates, of_product * raised * gates * (1 - gates)
        of_value = of_raised @ up.T + of_gates @ gate.T
        rows, width = value.flatten(0, -2), value.shape[-1]
        return (
            of_value,
            rows.T @ of_raised.reshape(-1, width),
            rows.T @ of_gates.reshape(-1, width),
            (raised * gates).reshape(-1, width).T @ doubled.reshape(-1, width),
        )
