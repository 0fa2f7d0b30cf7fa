"""Multi-head latent attention on Megatron-core's `MLASelfAttention`, with other down projections and core.

    hidden [S/P or S, B, H]
      -> down projections (replicated over tensor ranks)           query latent; latent and rotary key
      -> norms of the two latents
      -> up projections (column-parallel: 1/P of the heads)        query [S, B, N/P, D+R], key, value
      -> rotary embeddings on the last R features of the queries, and on the rotary key that all heads share
      -> core attention, output projection (row-parallel)

Under sequence parallelism, the down projections compute a rank's local tokens; otherwise all ranks compute
the same. Megatron-core's local spec shards these projections by columns. Each of them then gathers the hidden
states of all tokens under sequence parallelism, and the widths of the latents must be divisible by the ranks.
Moreover, megatron-core 0.16.1 does not sum the gradient of the rotary key over tensor ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from typing_extensions import override

from sas_megatron.attention.core import CoreAttention, check_backend
from sas_megatron.attention.kv_cache import KeyValueCache
from sas_megatron.attention.layer import AttentionLayer
from sas_megatron.attention.mla.config import LatentAttentionConfig
from sas_megatron.data.segments import Segments
from sas_megatron.distributed.gradient_sums import sum_gradients_over
from sas_megatron.platform.transformer_engine_fallbacks import (
    ReplicatedNorm,
    allow_mla_without_transformer_engine,
    apply_rope,
)


class DownProjection(MegatronModule):
    """A linear map [.., H] -> [.., W] whose weight is replicated over the tensor ranks.

    Under sequence parallelism, a rank's gradient of the weight is a sum over its local tokens; the attribute
    `sequence_parallel` makes the engines sum these once per step, as for norms. Without it, all ranks compute
    the same tokens, and need the full gradient of the result. The up projections sum that of the latents. The
    last `num_shared_columns` columns are read by each rank's local heads directly, so their gradient is a
    partial sum, which is summed here. (Under sequence parallelism, the gather of the rotary key sums it.)
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        output_size: int,
        *,
        tp_group: torch.distributed.ProcessGroup,
        num_shared_columns: int = 0,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.num_shared_columns = 0 if config.sequence_parallel else num_shared_columns
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
        """Return the result and no bias, as Megatron-core's linear layers do."""
        projected = F.linear(hidden, self.weight)
        if self.num_shared_columns and self.tp_group.size() > 1:
            widths = [projected.shape[-1] - self.num_shared_columns, self.num_shared_columns]
            latent, shared = projected.split(widths, dim=-1)
            # In 0.16.1, Megatron-core's `copy_to_tensor_model_parallel_region` loses the sum of a gradient
            # that is a slice of another tensor, as this one is.
            projected = torch.cat([latent, *sum_gradients_over(self.tp_group, [shared])], dim=-1)
        return projected, None


class LatentSelfAttention(AttentionLayer, MLASelfAttention):
    """`MLASelfAttention` with the same outputs and gradients for every number of tensor ranks.

    The norms of the latents are RMSNorm, as in the paper, whatever norm the model has.
    """

    transformer_config_type: ClassVar[type[TransformerConfig]] = MLATransformerConfig

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
        # Skip the parent's constructor, which accepts only three classes for the down projections, and would
        # build sharded ones first.
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
            num_shared_columns=config.qk_pos_emb_head_dim,
        )
        self.kv_layernorm = self._latent_norm(submodules.kv_layernorm, config.kv_lora_rank)
        self.linear_kv_up_proj = self._up_projection(
            submodules.linear_kv_up_proj,
            config.kv_lora_rank,
            config.num_attention_heads * (config.qk_head_dim + config.v_head_dim),
            buffer_name="kv_up_proj",
        )

    @classmethod
    @override
    def build_spec(cls, attention: LatentAttentionConfig) -> ModuleSpec:
        check_backend(attention)
        allow_mla_without_transformer_engine()
        return ModuleSpec(
            module=cls,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=ColumnParallelLinear,
                linear_q_up_proj=ColumnParallelLinear,
                linear_kv_up_proj=ColumnParallelLinear,
                # Megatron-core builds it both by a call and by `build_module`: a spec supports both.
                core_attention=ModuleSpec(module=CoreAttention, params={"attention": attention}),
                linear_proj=RowParallelLinear,
                q_layernorm=ReplicatedNorm,
                kv_layernorm=ReplicatedNorm,
            ),
        )

    @classmethod
    @override
    def transformer_options(cls, attention: LatentAttentionConfig) -> dict[str, Any]:
        """Return the widths of this config, instead of Megatron-core's defaults, and the type `rope`.

        Megatron-core's default is YaRN, which has other angles and may change the softmax scale. The factors
        that change it are set to neutral values, since 0.16.1 computes the scale from them for both types.
        """
        return {
            "q_lora_rank": attention.query_lora_rank,
            "kv_lora_rank": attention.kv_lora_rank,
            "qk_head_dim": attention.head_dim,
            "qk_pos_emb_head_dim": attention.rotary_head_dim,
            "v_head_dim": attention.value_width,
            "rope_type": "rope",
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        }

    @override
    def rotary_angles(
        self,
        rotary_pos_emb: torch.Tensor | None,
        hidden_states: torch.Tensor,
        cache: KeyValueCache | Segments | None,
    ) -> torch.Tensor | None:
        """Return the angles of the layer's own rotary embedding; None to apply none."""
        assert rotary_pos_emb is None, "latent attention computes its own rotary angles"
        if not self.has_rotary_embeddings:
            return None
        if cache is not None:
            # Packed: not only the positions of this context rank.
            angles: torch.Tensor = self.rotary_pos_emb(cache.max_tokens, packed_seq=True)
            return angles
        num_positions = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, None)
        angles = self.rotary_pos_emb(num_positions)
        return angles

    @override
    def project(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return queries, the normalized latent [S or S/P, B, L], and the rotary key [S, B, 1, R]."""
        rotary = self.config.qk_pos_emb_head_dim
        # Megatron-core's order: both down projections, then the query's projection or up projection.
        query_latent = None
        if self.config.q_lora_rank is not None:
            query_latent, _ = self.linear_q_down_proj(hidden_states)
        shared, _ = self.linear_kv_down_proj(hidden_states)
        if query_latent is None:
            columns, _ = self.linear_q_proj(hidden_states)
        else:
            columns, _ = self.linear_q_up_proj(self.q_layernorm(query_latent))
        latent, rotary_key = shared.split([self.config.kv_lora_rank, rotary], dim=-1)
        if self.config.sequence_parallel and self.tp_group.size() > 1:
            rotary_key = gather_from_sequence_parallel_region(rotary_key, group=self.tp_group)
        query, rotary_query = columns.unflatten(-1, (-1, self.q_head_dim)).split(
            [self.config.qk_head_dim, rotary], dim=-1
        )
        apply_rope = _rotate_neighbours if is_decoding else self.apply_rope
        query = torch.cat([query, apply_rope(rotary_query, rope)], dim=-1)
        return query, self.kv_layernorm(latent), apply_rope(rotary_key.unsqueeze(2), rope)

    @override
    def expand(
        self, kept: list[torch.Tensor], rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project keys and values of this rank's heads from the latents; all keys include the rotary key."""
        latent, rotary_key = kept
        columns, _ = self.linear_kv_up_proj(latent)
        widths = [self.config.qk_head_dim, self.config.v_head_dim]
        key, value = columns.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        key = torch.cat([key, rotary_key.expand(-1, -1, key.shape[2], -1)], dim=-1)
        return key, value.contiguous()

    @override
    def rotate(self, heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Apply rotary embeddings to the last R features of heads [S, B, N/P, D + R]."""
        if rope is None:
            return heads
        widths = [self.config.qk_head_dim, self.config.qk_pos_emb_head_dim]
        first, rotary = heads.split(widths, dim=-1)
        return torch.cat([first, self.apply_rope(rotary, rope)], dim=-1)

    @override
    def apply_rope(self, heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Apply rotary embeddings to heads [S, B, heads, R]."""
        if rope is not None and rope.shape[1] > 1:
            return _rotate_neighbours(heads, rope)
        return super().apply_rope(heads, rope)

    def _up_projection(self, spec: Any, input_size: int, output_size: int, *, buffer_name: str) -> Any:
        """Build a column-parallel projection without a bias."""
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
        """Build the norm between a down and an up projection."""
        return build_module(
            spec,
            config=self.config,
            hidden_size=width,
            eps=self.config.layernorm_epsilon,
            normalization="RMSNorm",
        )


def _rotate_neighbours(heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1), and store them as two halves, as Megatron-core does for this layer.

    Megatron-core's function requires the same positions in all sequences, which decoding and segments do not
    have.
    Without angles, return the heads.
    """
    if rope is None:
        return heads
    return apply_rope(torch.cat([heads[..., 0::2], heads[..., 1::2]], dim=-1), rope)
