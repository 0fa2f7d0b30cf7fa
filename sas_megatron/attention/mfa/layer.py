"""Multi-matrix factorization attention as a Megatron-core `SelfAttention`.

    hidden [S, B, H] -> shared columns (replicated over tensor ranks)        [S, B, R + D + D]
      -> R columns, normalized -> query_up (column-parallel over the heads)  [S, B, N/P, D]
      -> D and D columns: the key and the value head                         [S, B, 1, D] each
      -> rotary embeddings, core attention, output projection

Under sequence parallelism, each rank computes the shared columns of its local tokens, and these R + 2D
columns are all-gathered instead of the H columns of the hidden state: the first R by `query_up`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from typing_extensions import override

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.layer import SelfAttentionLayer
from sas_megatron.attention.mfa.config import FactorizedAttentionConfig
from sas_megatron.distributed.gradient_sums import gather_shared_columns, sum_gradients_over_tokens


class SharedProjection(nn.Module):
    """The projection to the columns that all heads read; it replaces Megatron-core's fused projection.

    Its weights are replicated over the tensor ranks: `weight` [R + 2D, H], with the rows of the query, the
    key and the value in this order, and `query_norm` [R].
    """

    def __init__(
        self,
        hidden_size: int,
        _output_size: int,
        *,
        attention: FactorizedAttentionConfig,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        **_options: Any,
    ) -> None:
        super().__init__()
        self.query_rank, self.epsilon = attention.query_rank, config.layernorm_epsilon
        self.layout: dict[str, Any] = {"group": tp_group, "sequence_parallel": config.sequence_parallel}
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        # `initialize_weights` sets the values of both.
        self.weight = nn.Parameter(torch.empty(attention.shared_width, hidden_size, **options))
        self.query_norm = nn.Parameter(torch.empty(attention.query_rank, **options))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project [S, B, H], or [S/P, B, H] under sequence parallelism.

        Returns:
            The query's columns of the same tokens, [.., B, R], normalized by their root mean square; key and
            value of all tokens side by side, [S, B, 2D].
        """
        weight, norm = sum_gradients_over_tokens((self.weight, self.query_norm), **self.layout)
        columns = F.linear(hidden_states, weight)
        query, key_value = columns.split([self.query_rank, len(weight) - self.query_rank], dim=-1)
        normalized = F.rms_norm(query, (self.query_rank,), norm, self.epsilon)
        return normalized, gather_shared_columns(key_value.contiguous(), **self.layout)


class FactorizedSelfAttention(SelfAttentionLayer):
    """Self-attention with low-rank queries, and one key and value head for all query heads."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        attention: FactorizedAttentionConfig,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **options)
        self.linear_query_up = ColumnParallelLinear(
            attention.query_rank,
            attention.num_heads * attention.head_dim,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=self.tp_group,
        )

    @classmethod
    @override
    def build_spec(cls, attention: FactorizedAttentionConfig) -> ModuleSpec:
        return build_self_attention_spec(
            attention,
            module=cls,
            linear_qkv=functools.partial(SharedProjection, attention=attention),
            attention=attention,
        )

    @override
    def project(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return queries [S, B, N/P, D] of this rank, and key and value [S, B, 1, D], equal on all ranks."""
        query_columns, key_value = self.linear_qkv(hidden_states)
        # It gathers the tokens under sequence parallelism, and always sums the gradients of the columns.
        queries, _ = self.linear_query_up(query_columns)
        query = queries.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        key, value = key_value.unsqueeze(2).chunk(2, dim=-1)
        return self.apply_rope(query, rope), self.apply_rope(key, rope), value
