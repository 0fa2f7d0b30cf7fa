"""Steps that all attention variants share: rotary embeddings, softmax attention, and modifiers.

The modifiers are off by default: RMSNorm of queries and keys before rotary embeddings (QK-norm), knocking
heads on values (arXiv 2510.23052), RMSNorm of each head's result, and output gates (arXiv 2505.06708).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_sas_megatron import SASMegatronConfig


class RopeCosSin(NamedTuple):
    """Cosines and sines of the rotary angles of each token, [B or 1, 1, tokens, R/2]."""

    cosine: torch.Tensor
    sine: torch.Tensor


class Positions(NamedTuple):
    """Rotary embeddings and mask of a forward pass.

    Attributes:
        rope_of_new: Cosines and sines of the S new tokens.
        rope_of_all: Cosines and sines of all T tokens.
        allowed: The tokens to which each new token may attend, [B or 1, 1, S, T]; None for the causal mask.
    """

    rope_of_new: RopeCosSin
    rope_of_all: RopeCosSin
    allowed: torch.Tensor | None


def apply_rope(heads: torch.Tensor, rope: RopeCosSin) -> torch.Tensor:
    """Rotate the pairs (i, i + R/2) of the first R features of heads [B, heads, tokens, D]."""
    half = rope.cosine.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    cosine, sine = rope.cosine.to(heads.dtype), rope.sine.to(heads.dtype)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None
) -> torch.Tensor:
    """Return attention [B, M, S, D] of query [B, M, S, E], key [B, G, T, E] and value [B, G, T, D].

    Each key head is read by M/G consecutive query heads.
    """
    width, value_width = query.shape[-1], value.shape[-1]
    context = F.scaled_dot_product_attention(
        query,
        key,
        # The fused implementations require equal widths.
        F.pad(value, (0, width - value_width)),
        attn_mask=allowed,
        is_causal=allowed is None and query.shape[2] > 1,
        scale=1 / math.sqrt(width),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    narrowed: torch.Tensor = context[..., :value_width]
    return narrowed


def split_heads(columns: torch.Tensor, width: int) -> torch.Tensor:
    """Reshape [B, S, heads·width] to [B, heads, S, width]."""
    heads: torch.Tensor = columns.unflatten(-1, (-1, width))
    return heads.transpose(1, 2)


class Modifiers(nn.Module):
    """The weights of the modifiers that the config names."""

    def __init__(self, config: SASMegatronConfig) -> None:
        super().__init__()
        fields = config.attention
        self.epsilon, self.gate_kind = config.norm_epsilon, fields.get("output_gate", "none")
        value_width = fields.get("value_head_dim") or fields["head_dim"]
        query_key_width = fields.get("simulated_head_dim") or fields["head_dim"]
        query_key_width += fields.get("rotary_head_dim", 0)
        # SAS may apply rotary embeddings before it simulates heads, and thereby before the norm.
        self.defers_rope = fields.get("qk_norm", False) and fields.get("rotary") != "before"
        if fields.get("qk_norm", False):
            self.query_norm = nn.Parameter(torch.ones(query_key_width))
            self.key_norm = nn.Parameter(torch.ones(query_key_width))
        if fields.get("knocking_heads", False):
            shape = (value_width, value_width)
            self.knocking = nn.ParameterDict({name: torch.empty(shape) for name in ("up", "gate", "down")})
        if fields.get("output_norm", False):
            self.output_norm = nn.Parameter(torch.ones(value_width))
        if self.gate_kind != "none":
            width = value_width if self.gate_kind == "elementwise" else 1
            self.output_gate = nn.Linear(config.hidden_size, fields["num_heads"] * width, bias=False)

    def split_rope(self, rope: RopeCosSin) -> tuple[RopeCosSin, RopeCosSin]:
        """Return the rotary embeddings before QK-norm and those after it; one of them rotates nothing."""
        none = RopeCosSin(*(part[..., :0] for part in rope))
        return (none, rope) if self.defers_rope else (rope, none)

    def normalize(self, name: str, heads: torch.Tensor) -> torch.Tensor:
        """Return heads with RMSNorm over the last axis, or unchanged if there is no such norm."""
        if not hasattr(self, name):
            return heads
        return F.rms_norm(heads, heads.shape[-1:], getattr(self, name), self.epsilon)

    def knock(self, value: torch.Tensor) -> torch.Tensor:
        """Return 2·[V·W_up ⊙ σ(V·W_gate)]·W_down for each head, or the values."""
        if not hasattr(self, "knocking"):
            return value
        up, gate, down = (self.knocking[name] for name in ("up", "gate", "down"))
        knocked: torch.Tensor = 2 * ((value @ up) * torch.sigmoid(value @ gate)) @ down
        return knocked

    def gate(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return heads [B, S, N, D] side by side, times their gates if there are any."""
        if self.gate_kind != "none":
            gates = torch.sigmoid(self.output_gate(hidden))
            context = context * gates.unflatten(-1, (context.shape[2], -1))
        return context.flatten(2)
