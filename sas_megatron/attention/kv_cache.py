"""The KV cache. Each attention layer decides what it stores of a token (`AttentionLayer.project`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.transformer.enums import AttnMaskType


class KeyValueCache:
    """Tensors kept of the tokens of B sequences, for the layers of this rank.

    The slot of a token is its position. New tokens form a rectangle, in which shorter sequences are padded at
    their end. The slots of padding are behind the sequence; they are not read until a later token overwrites
    them.
    """

    def __init__(self, batch_size: int, *, max_tokens: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self.lengths = [0] * batch_size
        self._device = device
        self._kept: dict[int, list[torch.Tensor]] = {}

    def begin_pass(self, num_new: int) -> None:
        """Assign slots to `num_new` new tokens of each sequence, and set T (`num_slots`) and the mask."""
        first_B = torch.tensor(self.lengths, device=self._device)
        self.positions_SB = first_B + torch.arange(num_new, device=self._device)[:, None]
        self.num_slots = max(self.lengths) + num_new
        self.mask_type, self.forbidden = AttnMaskType.causal, None
        if max(self.lengths) == 0:
            return
        if num_new == 1 and min(self.lengths) == max(self.lengths):
            self.mask_type = AttnMaskType.no_mask  # every new token attends to every slot
            return
        slots = torch.arange(self.num_slots, device=self._device)
        self.forbidden = (slots > self.positions_SB.T[:, None, :, None]).contiguous()  # [B, 1, S, T]

    def mask(self, window: int | None) -> tuple[torch.Tensor | None, AttnMaskType]:
        """Return the mask of this pass for a layer, [B, 1, S, T] or None, and its type without a mask tensor.

        Without earlier tokens, the type is causal, and core attention itself applies the window.

        Args:
            window: Number of keys that a query attends to, the last of which is its own; None for all.
        """
        if window is None or self.num_slots <= window or max(self.lengths) == 0:
            return self.forbidden, self.mask_type
        slots = torch.arange(self.num_slots, device=self._device)
        positions_BS = self.positions_SB.T[:, None, :, None]
        return (slots > positions_BS) | (slots <= positions_BS - window), self.mask_type

    def update(self, layer_number: int, new: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Store a layer's tensors [S, B, ...] of new tokens; return its tensors [T, B, ...] of all tokens."""
        if layer_number not in self._kept:
            # Zeros, since an attention weight of 0 does not hide a NaN in uninitialized memory.
            self._kept[layer_number] = [part.new_zeros(self.max_tokens, *part.shape[1:]) for part in new]
        sequences = torch.arange(len(self.lengths), device=self._device)
        for kept, part in zip(self._kept[layer_number], new, strict=True):
            kept[self.positions_SB, sequences] = part
        return [kept[: self.num_slots] for kept in self._kept[layer_number]]

    def end_pass(self, num_new: Sequence[int]) -> None:
        """Advance the sequences by the numbers of new tokens that were not padding."""
        self.lengths = [length + new for length, new in zip(self.lengths, num_new, strict=True)]

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but the given ones, which are renumbered in their order."""
        chosen = torch.tensor(sequences, device=self._device, dtype=torch.long)
        self.lengths = [self.lengths[sequence] for sequence in sequences]
        self._kept = {
            layer: [part.index_select(1, chosen) for part in parts] for layer, parts in self._kept.items()
        }

    def select_new(self, rope: torch.Tensor) -> torch.Tensor:
        """Select the rotary angles of the new tokens, [S, B, 1, R], from all angles, [slots, 1, 1, R]."""
        selected: torch.Tensor = rope[self.positions_SB].squeeze(2)
        return selected

    @property
    def bytes_per_token(self) -> int:
        """Bytes that this rank stores per token; 0 before the first pass."""
        parts = [part for parts in self._kept.values() for part in parts]
        return sum(math.prod(part.shape[2:]) * part.element_size() for part in parts)
