"""The base class of attention layers: one route from hidden states to the output for training and decoding.

    hidden states [S, B, H]
      -> project: queries, and the tensors kept of each token for its key and value
      -> the KV cache (decoding only): the kept tensors of all T tokens
      -> expand: keys and values of all T tokens
      -> core attention -> output projection

Megatron-core passes the KV cache to the layers as `inference_context`. Its own caches are not used: the
static one stores full keys and values and one length for all sequences of a batch; the dynamic one requires
flash-attention. Neither can store the base heads of SAS, or latents, or factors.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.kv_cache import KeyValueCache
from sas_megatron.config.attention import AttentionConfig, resolve_part
from sas_megatron.platform.transformer_engine_fallbacks import apply_rope


class AttentionLayer:
    """A mixin for a Megatron-core attention module; a variant overrides `project`, `expand`, `build_spec`."""

    # The class of Megatron-core's config that the module needs.
    transformer_config_type: ClassVar[type[TransformerConfig]] = TransformerConfig

    config: Any
    layer_number: int
    core_attention: Any
    linear_proj: Any
    pg_collection: Any

    @classmethod
    def build_spec(cls, attention: Any) -> ModuleSpec:
        """Build the spec of this layer for a config of its kind.

        Raises:
            FieldError: The configured backend or kernel cannot run on this machine.
        """
        raise NotImplementedError

    @classmethod
    def transformer_options(cls, attention: Any) -> dict[str, Any]:
        """Return further fields of `transformer_config_type`."""
        return {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        inference_context: KeyValueCache | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the layer's output [S, B, H] and the bias of the output projection.

        Args:
            hidden_states: [S, B, H], or [S/P, B, H] under sequence parallelism.
            attention_mask: True where attention is forbidden, [B or 1, 1, S, S]; None for the causal mask.
            inference_context: The cache, when decoding; it also decides the mask.
            rotary_pos_emb: Rotary angles [positions, 1, 1, R] of the model: of the S tokens, or when
                decoding of all slots of the cache.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Raises:
            NotImplementedError: An additive bias or packed sequences are given.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError(
                "attention layers support neither an additive bias nor packed sequences"
            )
        cache = inference_context
        is_decoding = cache is not None
        rope = self.rotary_angles(rotary_pos_emb, hidden_states, cache)
        new_rope = rope if cache is None or rope is None else cache.select_new(rope)
        query, *kept = self.project(hidden_states, new_rope, is_decoding=is_decoding)
        if cache is not None:
            kept = cache.update(self.layer_number, kept)
            rope = None if rope is None else rope[: cache.num_slots]
        key, value = self.expand(kept, rope, is_decoding=is_decoding)
        if cache is not None:
            context = self.core_attention(query, key, value, cache.forbidden, attn_mask_type=cache.mask_type)
        elif self.checkpoint_core_attention and self.training:  # type: ignore[attr-defined]
            context = self._checkpointed_attention_forward(  # type: ignore[attr-defined]
                query, key, value, attention_mask
            )
        else:
            context = self.core_attention(
                query, key, value, attention_mask, attn_mask_type=AttnMaskType.causal
            )
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(context)
        return output

    def rotary_angles(
        self, rotary_pos_emb: torch.Tensor | None, hidden_states: torch.Tensor, cache: KeyValueCache | None
    ) -> torch.Tensor | None:
        """Return the rotary angles [positions, 1, 1, R], by default the model's; None to apply none."""
        assert cache is None or rotary_pos_emb is not None, "decoding needs the model's rotary angles"
        return rotary_pos_emb if self.has_rotary_embeddings else None

    @property
    def has_rotary_embeddings(self) -> bool:
        """Whether this layer applies rotary embeddings.

        Megatron-core's config lists the layers without them: all for `attention.rotary=none`, and the layers
        that Megatron-LM's scripts select.
        """
        layers_without = self.config.no_rope_freq
        return not (layers_without and layers_without[self.layer_number - 1])

    def project(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return queries [S, B, M, E], and the tensors [S, B, ...] from which `expand` gets keys and values.

        By default, these are keys and values, with rotary embeddings applied.

        Args:
            hidden_states: [S, B, H], or [S/P, B, H] under sequence parallelism.
            rope: Rotary angles of the S tokens, [S, 1 or B, 1, R]; None to apply none.
            is_decoding: Whether the tensors are stored in a KV cache.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)  # type: ignore[attr-defined]
        return self.apply_rope(query, rope), self.apply_rope(key, rope), value

    def expand(
        self, kept: list[torch.Tensor], rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [T, B, G, E] and values [T, B, G, D] of all T tokens; by default the kept tensors.

        Args:
            kept: The tensors of `project`, for all T tokens.
            rope: Rotary angles of the T tokens, [T, 1, 1, R]; None to apply none.
            is_decoding: Whether `kept` comes from a KV cache.
        """
        key, value = kept
        return key, value

    def apply_rope(self, heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Apply rotary embeddings to heads [S, B, heads, E], by Megatron-core's kernel where possible.

        Megatron-core's kernels require the same positions in all sequences, [S, 1, 1, R].
        """
        if rope is None:
            return heads
        if rope.shape[1] > 1:
            return apply_rope(heads, rope)
        rotated: torch.Tensor = apply_rotary_pos_emb(
            heads,
            rope,
            config=self.config,
            mscale=_yarn_get_concentration_factor_from_config(self.config),
            cp_group=self.pg_collection.cp,
        )
        return rotated


class SelfAttentionLayer(AttentionLayer, SelfAttention):
    """Megatron-core's `SelfAttention` on the route of `AttentionLayer`; the base of most variants."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        if getattr(config, "attention_output_gate", False):
            raise NotImplementedError("the attention layers have no output gate")
        super().__init__(config, *args, **options)

    @classmethod
    @override
    def build_spec(cls, attention: Any) -> ModuleSpec:
        return build_self_attention_spec(attention, module=cls)


def resolve_layer(attention: AttentionConfig) -> type[AttentionLayer]:
    """Return the layer class of an attention's kind.

    Raises:
        FieldError: The kind is unknown, or its package registers it by the former contract.
    """
    layer: type[AttentionLayer] = resolve_part(attention.kind, "layer")
    return layer
