"""Differential attention, second version, as a Megatron-core `SelfAttention` of 2N query heads.

    hidden [S, B, H] -> linear_qkv (column-parallel): queries [S, B, 2N/P, D], keys and values [S, B, G/P, D]
      -> rotary embeddings, core attention                  a [S, B, 2N/P, D]
      -> a_2i - σ(x·W_λ)_i · a_(2i+1)                       [S, B, N/P, D]
      -> output projection of N·D columns

As in the authors' module (microsoft/unilm, Diff-Transformer-V2/multihead_flashdiffv2.py), the two heads of a
pair are next to each other, so they read the same key/value head, and are on the same tensor rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.diff.config import DifferentialAttentionConfig
from sas_megatron.attention.layer import SelfAttentionLayer
from sas_megatron.attention.modifiers import HeadColumns


class _HalvedInputLinear(RowParallelLinear):
    """A row-parallel linear layer with half of the given input columns, since pairs of heads become one."""

    def __init__(self, input_size: int, *args: Any, **options: Any) -> None:
        super().__init__(input_size // 2, *args, **options)


class DifferentialSelfAttention(SelfAttentionLayer):
    """Self-attention whose heads are differences of two query heads' results."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        attention: DifferentialAttentionConfig,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **options)
        self.linear_lambda = HeadColumns(
            config.hidden_size, attention.num_heads, config=config, group=self.tp_group
        )

    @classmethod
    @override
    def build_spec(cls, attention: DifferentialAttentionConfig) -> ModuleSpec:
        spec = build_self_attention_spec(attention, module=cls, attention=attention)
        spec.submodules.linear_proj = _HalvedInputLinear
        return spec

    @override
    def reduce_heads(self, context: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the differences of neighbouring heads, [S, B, 2N/P·D] -> [S, B, N/P·D]."""
        factors_SBN1 = torch.sigmoid(self.linear_lambda(hidden_states)).unsqueeze(-1)
        pairs = context.unflatten(-1, (-1, 2, self.hidden_size_per_attention_head))
        first_SBND, second_SBND = pairs.unbind(-2)
        reduced: torch.Tensor = (first_SBND - factors_SBN1 * second_SBND).flatten(2)
        return reduced
