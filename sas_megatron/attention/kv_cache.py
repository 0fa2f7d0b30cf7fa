"""Attention over new tokens that reads those before them from a cache, in layers of every variant.

    hidden states of S new tokens [S, B, H]
      -> project: their queries, and what is kept of each (the variant says what that is)
      -> the cache: what is kept of all T tokens, those before included
      -> expand: keys and values of all T tokens
      -> core attention -> output projection

The cache reaches the layers as Megatron-core hands on its own, as `inference_context`. Its own are not
used: the static one holds whole keys and values, and one length for all sequences of a batch; the dynamic
one needs flash-attention. Neither has a place for SAS's base heads, for latents or for factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

from sas_megatron.platform.transformer_engine_fallbacks import apply_rope


class KeyValueCache:
    """What decoding keeps of the tokens of B sequences, in the layers that this rank has.

    A token's slot is its position. New tokens come as a rectangle, with shorter sequences padded at their
    end: what is kept of padding lies behind the sequence, where nothing reads it before a later token takes
    its slot.
    """

    def __init__(self, batch_size: int, *, max_tokens: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self.lengths = [0] * batch_size
        self._device = device
        self._kept: dict[int, list[torch.Tensor]] = {}

    def begin_pass(self, num_new: int) -> None:
        """Places `num_new` new tokens of each sequence behind those that are kept.

        It decides the slots that attention reads, T, and which of them each new token may not read.
        """
        first_B = torch.tensor(self.lengths, device=self._device)
        self.positions_SB = first_B + torch.arange(num_new, device=self._device)[:, None]
        self.num_slots = max(self.lengths) + num_new
        self.mask_type, self.forbidden = AttnMaskType.causal, None
        if max(self.lengths) == 0:
            return
        if num_new == 1 and min(self.lengths) == max(self.lengths):
            self.mask_type = AttnMaskType.no_mask  # each reads every slot
            return
        slots = torch.arange(self.num_slots, device=self._device)
        self.forbidden = (slots > self.positions_SB.T[:, None, :, None]).contiguous()  # [B, 1, S, T]

    def update(self, layer_number: int, new: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keeps what a layer gives of the new tokens, each [S, B, ..]; what is kept of all, [T, B, ..]."""
        if layer_number not in self._kept:
            # Zeros, since an attention weight of 0 does not hide a slot that happens to hold a NaN.
            self._kept[layer_number] = [part.new_zeros(self.max_tokens, *part.shape[1:]) for part in new]
        sequences = torch.arange(len(self.lengths), device=self._device)
        for kept, part in zip(self._kept[layer_number], new, strict=True):
            kept[self.positions_SB, sequences] = part
        return [kept[: self.num_slots] for kept in self._kept[layer_number]]

    def end_pass(self, num_new: Sequence[int]) -> None:
        """Tells how many of the new tokens of each sequence were no padding."""
        self.lengths = [length + new for length, new in zip(self.lengths, num_new, strict=True)]

    def keep(self, sequences: Sequence[int]) -> None:
        """Forgets all sequences but these, which get new numbers in their order."""
        chosen = torch.tensor(sequences, device=self._device, dtype=torch.long)
        self.lengths = [self.lengths[sequence] for sequence in sequences]
        self._kept = {
            layer: [part.index_select(1, chosen) for part in parts] for layer, parts in self._kept.items()
        }

    def of_new(self, angles: torch.Tensor) -> torch.Tensor:
        """Rotary angles by slot [slots, 1, 1, R] -> those of the new tokens [S, B, 1, R]."""
        found: torch.Tensor = angles[self.positions_SB].squeeze(2)
        return found

    @property
    def bytes_per_token(self) -> int:
        """What this rank keeps of a token, after a first pass."""
        parts = [part for parts in self._kept.values() for part in parts]
        return sum(math.prod(part.shape[2:]) * part.element_size() for part in parts)


class CachingAttention:
    """Given a `KeyValueCache`, runs a pass of the attention that it is mixed into over new tokens.

    As it stands it keeps whole keys, with their positions, and values. A variant that can keep less
    overrides `project` and `expand`.
    """

    layer_number: int
    core_attention: Any
    linear_proj: Any
    get_query_key_value_tensors: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        inference_context: KeyValueCache | None = None,
        rotary_pos_emb: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Without a cache, what the attention computes; with one, the same of new tokens.

        Then `rotary_pos_emb` are the angles of all slots, and the cache says which tokens may be read.
        """
        if inference_context is None:
            result: tuple[torch.Tensor, torch.Tensor | None] = super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **options
            )
            return result
        cache = inference_context
        angles = self.angles_of_slots(rotary_pos_emb, cache)
        query, *new = self.project(hidden_states, cache.of_new(angles))
        key, value = self.expand(cache.update(self.layer_number, new), angles[: cache.num_slots])
        context = self.core_attention(query, key, value, cache.forbidden, attn_mask_type=cache.mask_type)
        projected: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(context)
        return projected

    def angles_of_slots(self, handed: torch.Tensor | None, cache: KeyValueCache) -> torch.Tensor:
        """Rotary angles [slots, 1, 1, R]: those that the model hands to its layers."""
        del cache
        assert handed is not None, "the model hands its rotary angles to layers that have none"
        return handed

    def project(self, hidden_states: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The queries [S, B, M, E] of new tokens, turned by `angles`, and what is kept, each [S, B, ..]."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        return apply_rope(query, angles), apply_rope(key, angles), value

    def expand(self, kept: list[torch.Tensor], angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of all tokens -> keys [T, B, G, E], turned, and values [T, B, G, D]."""
        key, value = kept
        return key, value


class CachingSelfAttention(CachingAttention, SelfAttention):
    """Megatron-core's self-attention, able to decode; what variants of it are derived from."""
