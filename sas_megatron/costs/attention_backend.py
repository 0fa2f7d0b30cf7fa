"""Which implementation of core attention runs on which device, decided without tensors or torch.

    attention.backend   on a CPU                                     on a GPU
    unfused             unfused                                      unfused
    fused               fused, or composed if there is dropout       fused
    cudnn               (rejected)                                   cudnn
    auto                chunked if it applies, otherwise as fused    fused

`fused` is torch's scaled-dot-product attention, for which values are padded to the width of the keys.
`composed` is the sequence of plain operations that torch falls back to when it has no fused kernel.
`cudnn` needs no padding; it does not support a single key, which therefore runs as `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.head_sharding import count_attended_heads

Device = Literal["cpu", "gpu"]
Backend = Literal["fused", "composed", "unfused", "chunked", "cudnn"]
# Implementations whose backward pass recomputes the scores.
RECOMPUTING: tuple[Backend, ...] = ("fused", "cudnn")

# Fastest of 64, 128 and 256 at 512 tokens: a smaller chunk wastes less on the diagonal, a larger one needs
# fewer matrix products.
CHUNK_TOKENS = 64
# In longer sequences, the saved attention weights take more memory than everything else in a layer.
LONGEST_CHUNKED_SEQUENCE = 1024


def query_chunks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end index of each chunk of queries in a sequence of `length` tokens."""
    for start in range(0, length, CHUNK_TOKENS):
        yield start, min(start + CHUNK_TOKENS, length)


def uses_chunks(
    *, device: Device, causal: bool, dropout: float, is_wide: bool, is_paired: bool, length: int
) -> bool:
    """Return whether chunked attention supports a case and is faster than fused attention.

    Args:
        device: The device that computes it.
        causal: Whether the mask is the causal one, with no mask tensor.
        dropout: Probability of dropping an attention weight.
        is_wide: Whether elements are float32 or float64.
        is_paired: Whether there are equally many query heads and key heads, and queries and keys.
        length: Number of tokens.
    """
    is_supported = causal and dropout == 0.0 and is_paired
    return is_supported and device == "cpu" and is_wide and length <= LONGEST_CHUNKED_SEQUENCE


def resolve_backend(config: RunConfig, *, device: Device, sequence_length: int | None = None) -> Backend:
    """Return the implementation that `attention.backend` selects on a device.

    Args:
        config: The run.
        device: The device that computes it.
        sequence_length: Number of tokens; None for that of the config.
    """
    attention, parallel = config.attention, config.parallel
    if attention.backend in ("unfused", "cudnn"):
        return attention.backend
    queries, keys = count_attended_heads(attention, tensor=parallel.tensor, context=parallel.context)
    is_chunked = attention.backend == "auto" and uses_chunks(
        device=device,
        causal=not config.data.reset_at_document_ends,
        dropout=attention.dropout,
        is_wide=config.training.precision == "float32",
        is_paired=queries == keys,
        length=sequence_length or config.data.sequence_length,
    )
    if is_chunked:
        return "chunked"
    return "composed" if attention.dropout > 0 and device == "cpu" else "fused"
