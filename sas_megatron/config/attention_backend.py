"""Which back end of the core attention runs where, by rules that need no tensor; no torch.

    attention.backend   on a CPU                                                elsewhere
    unfused             unfused                                                 unfused
    fused               fused, or composed where weights are dropped            fused
    cudnn               (refused)                                               cudnn
    auto                chunked where that is offered and faster, else fused    fused

Values of another width than the keys' are padded, but for cudnn and the plain products. composed is what
torch's fused attention falls back to without a kernel: plain products. cudnn leaves a single key, which it
does not take, to fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Device = Literal["cpu", "gpu"]
Backend = Literal["fused", "composed", "unfused", "chunked", "cudnn"]
# Those whose backward pass makes the scores anew.
RECOMPUTING: tuple[Backend, ...] = ("fused", "cudnn")

# Fastest of 64, 128 and 256 at 512 tokens; smaller wastes less on the diagonal, larger runs fewer products.
CHUNK_TOKENS = 64
# Beyond it the kept weights outweigh everything else of a layer.
LONGEST_CHUNKED_SEQUENCE = 1024


def chunks(length: int) -> Iterator[tuple[int, int]]:
    """First and end token of each chunk of queries."""
    for start in range(0, length, CHUNK_TOKENS):
        yield start, min(start + CHUNK_TOKENS, length)


def runs_in_chunks(
    *, device: Device, causal: bool, dropout: float, wide: bool, paired: bool, length: int
) -> bool:
    """Whether attention by chunks computes this, and faster.

    Args:
        device: Where.
        causal: By position alone, without a mask.
        dropout: Share of the weights that is dropped.
        wide: In float32 or more.
        paired: As many key heads as query heads, of as many tokens.
        length: Tokens.
    """
    offered = causal and dropout == 0.0 and paired
    return offered and device == "cpu" and wide and length <= LONGEST_CHUNKED_SEQUENCE
