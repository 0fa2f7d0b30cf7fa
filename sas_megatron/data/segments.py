"""The segments of a microbatch: runs of tokens of one document, which attend only to each other.

    positions [B, S] that restart at each document -> lengths of the segments of each sample
      -> cumulative lengths over the microbatch, sample by sample

Megatron-core passes them to the attention layers as `packed_seq_params`. Tokens keep the layout [S, B, H] of
other microbatches, in which a segment never crosses the end of a sample; Megatron-core's own packed layout is
[T, 1, H].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Segments(PackedSeqParams):
    """The segments of a microbatch [S, B], as Megatron-core's `packed_seq_params`.

    Attributes:
        lengths: Tokens of each segment, for each of the B samples; their sum is S in each sample.
        positions: Position in its segment of each token that this context rank holds, [S, B].
    """

    lengths: tuple[tuple[int, ...], ...] = ()
    positions: torch.Tensor | None = None
    # The angles of all positions that `select_new` was called with last, and its result.
    _selected: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @staticmethod
    def build(lengths: Sequence[Sequence[int]], positions_BS_local: torch.Tensor) -> Segments:
        """Build the segments of a microbatch.

        Args:
            lengths: Tokens of each segment, for each sample, over all context ranks.
            positions_BS_local: Position in its segment of each token of this context rank, on the device of
                the model.
        """
        flat = torch.tensor([length for sample in lengths for length in sample])
        cumulative = torch.nn.functional.pad(flat.cumsum(0), (1, 0)).to(torch.int32)
        cumulative = cumulative.to(positions_BS_local.device, non_blocking=True)
        # Megatron-core's model computes the rotary angles of this many positions, and caches them by their
        # number. With the format `thd` it returns all of them on every context rank.
        num_positions = sum(lengths[0])
        return Segments(
            qkv_format="thd",
            cu_seqlens_q=cumulative,
            cu_seqlens_kv=cumulative,
            max_seqlen_q=num_positions,
            max_seqlen_kv=num_positions,
            lengths=tuple(map(tuple, lengths)),
            positions=positions_BS_local.T,
        )

    @property
    def max_tokens(self) -> int:
        """S, the number of positions for which rotary angles are needed."""
        return sum(self.lengths[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(map(max, self.lengths))

    @property
    def are_whole_samples(self) -> bool:
        """Whether no sample has a boundary within it."""
        return all(len(sample) == 1 for sample in self.lengths)

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
        """Return the segments with changed tensors, such as copies on a device."""
        assert self.positions is not None, "built without positions"
        changed = copy.copy(self)
        changed.cu_seqlens_q = changed.cu_seqlens_kv = change(self.cu_seqlens_q)
        changed.positions = change(self.positions)
        changed._selected = (None, None)
        return changed

    def select_new(self, rope: torch.Tensor) -> torch.Tensor:
        """Select the rotary angles of the tokens, [S, B, 1, R], from those of all positions, [S, 1, 1, R].

        All layers get the same tensor, since the model passes the same angles to them.
        """
        known, selected = self._selected
        if selected is None or known is not rope:
            selected = rope[self.positions].squeeze(2)
            self._selected = (rope, selected)
        return selected


def segment_lengths(positions_S: torch.Tensor) -> list[int]:
    """Return the lengths of the segments of a sample, given positions that restart at 0 in each of them."""
    starts = (positions_S == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions_S)], strict=True)]
