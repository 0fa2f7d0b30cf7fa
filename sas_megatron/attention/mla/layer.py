"""MLA as Megatron-core's `MLASelfAttention`: its data flow, its core replaced, its down projections ours.

    hidden [S/P or S, B, H]
      -> down projections (the whole weight on every tensor rank)    query latent | latent, rotary key
      -> norms of the two latents
      -> up projections (column parallel: a P-th of the heads)       query [S, B, N/P, D+R], key, value
      -> rotary positions on the last R features of queries and of the one rotary key
      -> core attention, output projection (row parallel)

The down projections work on a rank's own tokens under sequence parallelism, and otherwise do the same
on every rank. Megatron-core's local spec shards them by columns: that gathers the hidden states of all
tokens for each under sequence parallelism, wants ranks to divide the latents' widths, and in 0.16.1
leaves out a sum: that of the rotary key's gradient over tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from sas_megatron.attention.core import CoreAttention, check_backend
from sas_megatron.attention.kv_cache import CachingAttention, KeyValueCache
from sas_megatron.attention.mla.config import LatentAttentionConfig
from sas_megatron.distributed.gradient_sums import sum_gradients_over
from sas_megatron.platform.transformer_engine_fallbacks import (
    ReplicatedNorm,
    allow_mla_without_transformer_engine,
    apply_rope,
)


class DownProjection(MegatronModule):
    """[.., H] -> [.., W]: a linear map whose weight every tensor rank holds whole.

    Under sequence parallelism a rank's gradient of the weight is a sum over its own tokens; the mark
    makes the engines add the ranks' up once a step, as they do for norms. Without it, all ranks have
    the same tokens and need the same gradient of the result. For latents that is so: the up projections
    add it up. The last `num_own_columns` columns reach a rank's own heads with nothing between, so what
    comes back to them is a part, and is added up here. (Under sequence parallelism the gathering of the
    rotary key adds up.)
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        output_size: int,
        *,
        tp_group: torch.distributed.ProcessGroup,
        num_own_columns: int = 0,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.num_own_columns = 0 if config.sequence_parallel else num_own_columns
        self.weight = torch.nn.Parameter(
            torch.empty(
                output_size,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The result, and no bias, as Megatron-core's linears return them."""
        projected = F.linear(hidden, self.weight)
        if self.num_own_columns and self.tp_group.size() > 1:
            widths = [projected.shape[-1] - self.num_own_columns, self.num_own_columns]
            latent, own = projected.split(widths, dim=-1)
            # Not Megatron-core's `copy_to_tensor_model_parallel_region`: in 0.16.1 it loses the sum of a
            # gradient that is a slice of another, as this one is.
            projected = torch.cat([latent, *sum_gradients_over(self.tp_group, [own])], dim=-1)
        return projected, None


class LatentSelfAttention(CachingAttention, MLASelfAttention):
    """`MLASelfAttention` that has the same outputs and gradients at every number of tensor ranks.

    The paper's norms are RMSNorm, whatever the model's are.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **options: Any,
    ) -> None:
        # Past the parent's own constructor, which takes but three classes for the down projections, and
        # so would build sharded ones first.
        MultiLatentAttention.__init__(
            self,
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
            **options,
        )
        query_width = config.num_attention_heads * self.q_head_dim
        if config.q_lora_rank is None:
            self.linear_q_proj = self._up_projection(
                submodules.linear_q_proj, config.hidden_size, query_width, buffer_name="q_proj"
            )
        else:
            self.linear_q_down_proj = DownProjection(config, config.q_lora_rank, tp_group=self.tp_group)
            self.q_layernorm = self._latent_norm(submodules.q_layernorm, config.q_lora_rank)
            self.linear_q_up_proj = self._up_projection(
                submodules.linear_q_up_proj, config.q_lora_rank, query_width, buffer_name="q_up_proj"
            )
        self.linear_kv_down_proj = DownProjection(
            config,
            config.kv_lora_rank + config.qk_pos_emb_head_dim,
            tp_group=self.tp_group,
            num_own_columns=config.qk_pos_emb_head_dim,
        )
        self.kv_layernorm = self._latent_norm(submodules.kv_layernorm, config.kv_lora_rank)
        self.linear_kv_up_proj = self._up_projection(
            submodules.linear_kv_up_proj,
            config.kv_lora_rank,
            config.num_attention_heads * (config.qk_head_dim + config.v_head_dim),
            buffer_name="kv_up_proj",
        )

    def angles_of_slots(self, handed: torch.Tensor | None, cache: KeyValueCache) -> torch.Tensor:
        """The layer's own."""
        angles: torch.Tensor = self.rotary_pos_emb(cache.max_tokens)
        return angles

    def project(self, hidden_states: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries; the normalized latent [S, B, L] and the rotary key [S, B, 1, R] are what is kept."""
        rotary = self.config.qk_pos_emb_head_dim
        if self.config.q_lora_rank is None:
            columns, _ = self.linear_q_proj(hidden_states)
        else:
            latent, _ = self.linear_q_down_proj(hidden_states)
            columns, _ = self.linear_q_up_proj(self.q_layernorm(latent))
        query, rotary_query = columns.unflatten(-1, (-1, self.q_head_dim)).split(
            [self.config.qk_head_dim, rotary], dim=-1
        )
        shared, _ = self.linear_kv_down_proj(hidden_states)
        latent, rotary_key = shared.split([self.config.kv_lora_rank, rotary], dim=-1)
        query = torch.cat([query, _rotate_neighbours(rotary_query, angles)], dim=-1)
        return query, self.kv_layernorm(latent), _rotate_neighbours(rotary_key.unsqueeze(2), angles)

    def expand(self, kept: list[torch.Tensor], angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's heads, read out of the latents; the rotary key is the same for all."""
        latent, rotary_key = kept
        columns, _ = self.linear_kv_up_proj(latent)
        widths = [self.config.qk_head_dim, self.config.v_head_dim]
        key, value = columns.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        return torch.cat([key, rotary_key.expand(-1, -1, key.shape[2], -1)], dim=-1), value

    def _up_projection(self, spec: Any, input_size: int, output_size: int, *, buffer_name: str) -> Any:
        """Column parallel, without a bias."""
        return build_module(
            spec,
            input_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=buffer_name,
            tp_group=self.pg_collection.tp,
        )

    def _latent_norm(self, spec: Any, width: int) -> Any:
        """The norm between a down and an up projection."""
        return build_module(
            spec,
            config=self.config,
            hidden_size=width,
            eps=self.config.layernorm_epsilon,
            normalization="RMSNorm",
        )


def _rotate_neighbours(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2i, 2i + 1), and lays them out as two halves, as Megatron-core does for this layer."""
    return apply_rope(torch.cat([heads[..., 0::2], heads[..., 1::2]], dim=-1), angles)


def build_latent_attention_spec(variant: LatentAttentionConfig) -> ModuleSpec:
    """A `ModuleSpec` of latent attention on Megatron-core's parallel linears and our core attention.

    Raises:
        FieldError: the back end cannot run here.
    """
    check_backend(variant)
    allow_mla_without_transformer_engine()
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            # Megatron-core builds it both by calling and by `build_module`, so a spec, not a function.
            core_attention=ModuleSpec(module=CoreAttention, params={"attention": variant}),
            linear_proj=RowParallelLinear,
            q_layernorm=ReplicatedNorm,
            kv_layernorm=ReplicatedNorm,
        ),
    )
