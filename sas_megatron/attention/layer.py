"""The base class of attention layers: one route from hidden states to the output for training and decoding.

    hidden states [S, B, H]
      -> project: queries, and the tensors kept of each token for its key and value
      -> the KV cache (decoding only): the kept tensors of all T tokens
      -> expand: keys and values of all T tokens
      -> modifiers of queries, keys and values
      -> core attention -> reduce_heads -> modifiers of the result -> output projection

The modifiers (`attention.modifiers`) are off by default. A variant needs no code for them. With QK-norm, its
methods get no rotary angles, since the norm precedes the rotary embeddings; `rotate` then applies these.

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
from sas_megatron.attention.modifiers import AttentionModifiers, Weights
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import resolve_part
from sas_megatron.config.errors import FieldError
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
        modifiers: AttentionModifiers = self.core_attention.modifiers
        weights = modifiers()
        query, key, value = self._project_and_expand(
            hidden_states, rotary_pos_emb, cache=inference_context, weights=weights
        )
        context = self._attend(query, key, value, attention_mask, cache=inference_context)
        context = modifiers.normalize_output(self.reduce_heads(context, hidden_states), weights)
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(
            modifiers.gate_output(context, hidden_states)
        )
        return output

    def _project_and_expand(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: torch.Tensor | None,
        *,
        cache: KeyValueCache | None,
        weights: Weights,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries of the S tokens, and keys and values of all T tokens, all of them modified."""
        modifiers: AttentionModifiers = self.core_attention.modifiers
        is_decoding, norms = cache is not None, modifiers.attention.qk_norm
        # QK-norm precedes the rotary embeddings, unless SAS applies these before it simulates heads.
        rotates = norms and modifiers.attention.rotary != "before"
        rope = self.rotary_angles(rotary_pos_emb, hidden_states, cache)
        new_rope = rope if cache is None or rope is None else cache.select_new(rope)
        query, *kept = self.project(hidden_states, None if rotates else new_rope, is_decoding=is_decoding)
        if norms:
            query = self.rotate(modifiers.normalize_query(query, weights), new_rope if rotates else None)

        def modify(key: torch.Tensor, value: torch.Tensor, rope: torch.Tensor | None) -> list[torch.Tensor]:
            if norms:
                key = self.rotate(modifiers.normalize_key(key, weights), rope if rotates else None)
            return [key, modifiers.knock_values(value, weights)]

        caches_modified = cache is not None and not self.expands_cache
        if caches_modified:
            kept = modify(kept[0], kept[1], new_rope)
        if cache is not None:
            kept = cache.update(self.layer_number, kept)
            rope = None if rope is None else rope[: cache.num_slots]
        key, value = self.expand(kept, None if rotates else rope, is_decoding=is_decoding)
        if not caches_modified:
            key, value = modify(key, value, rope)
        return query, key, value

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """Return the result of core attention, [S, B, N/P·D]."""
        if cache is None and self.checkpoint_core_attention and self.training:  # type: ignore[attr-defined]
            context: torch.Tensor = self._checkpointed_attention_forward(  # type: ignore[attr-defined]
                query, key, value, attention_mask
            )
            return context
        mask, mask_type = attention_mask, AttnMaskType.causal
        if cache is not None:
            mask, mask_type = cache.forbidden, cache.mask_type
        context = self.core_attention(query, key, value, mask, attn_mask_type=mask_type)
        return context

    @property
    def expands_cache(self) -> bool:
        """Whether `expand` computes keys and values from the cached tensors, rather than returning these.

        If so, keys and values of all T tokens are modified in each step of decoding; otherwise only those of
        the new tokens, before they are cached.
        """
        return type(self).expand is not AttentionLayer.expand

    def reduce_heads(self, context: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return N/P heads [S, B, N/P·D] from the result of core attention; by default the result itself.

        Args:
            context: The result of core attention.
            hidden_states: The layer's input, [S, B, H], or [S/P, B, H] under sequence parallelism.
        """
        return context

    def rotate(self, heads: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Apply rotary embeddings to normalized heads [S, B, heads, E] of queries or keys."""
        return self.apply_rope(heads, rope)

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
            raise NotImplementedError("Megatron-core's output gate is not used; set attention.output_gate")
        super().__init__(config, *args, **options)

    @classmethod
    @override
    def build_spec(cls, attention: Any) -> ModuleSpec:
        return build_self_attention_spec(attention, module=cls)


def resolve_layer(attention: AttentionConfig) -> type[AttentionLayer]:
    """Return the layer class of an attention's kind.

    Raises:
        FieldError: The kind is unknown, its package registers it by the former contract, or its layer does
            not support QK-norm.
    """
    layer: type[AttentionLayer] = resolve_part(attention.kind, "layer")
    if attention.qk_norm and not attention.uses_model_rotary and layer.rotate is AttentionLayer.rotate:
        raise FieldError(
            "attention.qk_norm",
            True,
            f"is not supported by attention.kind={attention.kind}, whose layer has its own rotary embeddings "
            "and no method `rotate` that applies them to normalized heads",
            "set attention.qk_norm=false, or use another kind",
        )
    return layer
