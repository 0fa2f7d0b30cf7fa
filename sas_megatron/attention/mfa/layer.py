"""Multi-matrix factorization attention as a Megatron-core `SelfAttention`: its queries, key and value.

    hidden [S, B, H] -> shared columns (whole on every rank)       [S, B, C + D + D]
      -> C normalized -> query up (column parallel over the heads) [S, B, N/P, D]
      -> D and D: the one key and value head                       [S, B, 1, D] each
      -> the parent: rotary positions, core attention, output projection

Under sequence parallelism each rank computes the shared columns of its own tokens, and those C + 2D are
gathered in place of the H hidden columns: the first C by the query's column-parallel projection.
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

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.kv_cache import CachingSelfAttention
from sas_megatron.attention.mfa.config import FactorizedAttentionConfig
from sas_megatron.distributed.gradient_sums import gather_shared_columns, sum_gradients_over_tokens


class SharedProjection(nn.Module):
    """What all heads read, for the tokens at hand; built as Megatron-core builds its fused projection.

    Weights, replicated over the tensor ranks: `weight` [C + 2D, H], the query's, key's and value's rows
    in this order, and `query_norm` [C].
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
        width = attention.query_rank + 2 * attention.head_dim
        # `initialize_weights` gives both their values.
        self.weight = nn.Parameter(torch.empty(width, hidden_size, **options))
        self.query_norm = nn.Parameter(torch.empty(attention.query_rank, **options))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, B, H], or [S/P, B, H] under sequence parallelism -> the query's columns, for the same tokens
        [.., B, C], normalized by their root mean square; key and value side by side, for all [S, B, 2D].
        """
        weight, norm = sum_gradients_over_tokens((self.weight, self.query_norm), **self.layout)
        columns = F.linear(hidden_states, weight)
        query, key_value = columns.split([self.query_rank, len(weight) - self.query_rank], dim=-1)
        normalized = F.rms_norm(query, (self.query_rank,), norm, self.epsilon)
        return normalized, gather_shared_columns(key_value.contiguous(), **self.layout)


class FactorizedSelfAttention(CachingSelfAttention):
    """Self-attention whose queries come of few shared columns, and whose heads share one key and value."""

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

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, B, H] -> query [S, B, N/P, D] of this rank; key and value [S, B, 1, D], the same on all."""
        if output_gate or not split_qkv:
            raise NotImplementedError("MFA has neither an output gate nor a fused QKV rotary path")
        query_columns, key_value = self.linear_qkv(hidden_states)
        # Gathers the tokens under sequence parallelism, and adds up the columns' gradients in any case.
        queries, _ = self.linear_query_up(query_columns)
        query = queries.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        key, value = key_value.unsqueeze(2).chunk(2, dim=-1)
        return query, key, value


def build_factorized_spec(attention: FactorizedAttentionConfig) -> ModuleSpec:
    """`FactorizedSelfAttention` on the shared columns of `attention`."""
    return build_self_attention_spec(
        attention,
        module=FactorizedSelfAttention,
        linear_qkv=functools.partial(SharedProjection, attention=attention),
        attention=attention,
    )
