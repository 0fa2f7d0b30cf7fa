"""Which implementation of core attention runs on which device, decided without tensors or torch.

    attention.backend   on a CPU                                     on a GPU
    unfused             unfused                                      unfused
    fused               fused, or composed if there is dropout       fused
    cudnn               (rejected)                                   cudnn
    auto                chunked if it applies, otherwise as fused    fused

    with document ends or a window, on a GPU in half precision, without dropout and with at most 256
    features: varlen instead of fused

`fused` is torch's scaled-dot-product attention, for which values are padded to the width of the keys.
`composed` is the sequence of plain operations that torch falls back to when it has no fused kernel.
`cudnn` needs no padding; it does not support a single key, which therefore runs as `fused`. `varlen` is
torch's variable-length attention, with the padding of `fused`. The others compute each segment by itself.
Within a window, `chunked` leaves out the keys before it, `fused` and `composed` run once for each of
`window_blocks`, and `unfused` computes all scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.head_sharding import count_attended_heads

Device = Literal["cpu", "gpu"]
Backend = Literal["fused", "composed", "unfused", "chunked", "cudnn", "varlen"]
# Implementations whose backward pass recomputes the scores.
RECOMPUTING: tuple[Backend, ...] = ("fused", "cudnn", "varlen")
# Implementations that need values as wide as keys, and pad them.
PADDING: tuple[Backend, ...] = ("fused", "composed", "varlen")
# Largest number of features of torch's variable-length attention (flash attention 2).
VARLEN_WIDTH_LIMIT = 256

# Fastest of 64, 128 and 256 at 512 tokens: a smaller chunk wastes less on the diagonal, a larger one needs
# fewer matrix products.
CHUNK_TOKENS = 64
# In longer sequences, the saved attention weights take more memory than everything else in a layer.
LONGEST_CHUNKED_SEQUENCE = 1024


def query_chunks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end index of each chunk of queries in a sequence of `length` tokens."""
    for start in range(0, length, CHUNK_TOKENS):
        yield start, min(start + CHUNK_TOKENS, length)


def window_blocks(length: int, window: int) -> list[int]:
    """Return the sizes of the blocks of queries that attend to their own and the previous block's keys.

    A block has at least `window` queries, so that it needs no key before those of the previous block.
    """
    rows = max(window, CHUNK_TOKENS)
    return [min(rows, length - start) for start in range(0, length, rows)]


def first_key(start: int, window: int | None) -> int:
    """Return the first key that the query at `start` attends to."""
    return 0 if window is None else max(0, start - window + 1)


def uses_chunks(
    *, device: Device, dropout: float, is_wide: bool, is_paired: bool, length: int, window: int | None = None
) -> bool:
    """Return whether chunked attention supports a case and is faster than fused attention.

    Args:
        device: The device that computes it.
        dropout: Probability of dropping an attention weight.
        is_wide: Whether elements are float32 or float64.
        is_paired: Whether there are equally many query heads and key heads, and queries and keys.
        length: Number of tokens.
        window: Number of keys that a query attends to; None for all up to its own.
    """
    span = length if window is None else min(length, window)
    is_supported = dropout == 0.0 and is_paired
    return is_supported and device == "cpu" and is_wide and span <= LONGEST_CHUNKED_SEQUENCE


def uses_varlen(*, backend: str, is_half: bool, dropout: float, width: int) -> bool:
    """Return whether torch's variable-length attention supports a case, on a GPU that has it.

    Args:
        backend: The value of `attention.backend`.
        is_half: Whether elements are bfloat16 or float16.
        dropout: Probability of dropping an attention weight.
        width: Features of a query or key head.
    """
    return backend in ("auto", "fused") and is_half and dropout == 0.0 and width <= VARLEN_WIDTH_LIMIT


def resolve_backend(
    config: RunConfig, *, device: Device, sequence_length: int | None = None, window: int | None = None
) -> Backend:
    """Return the implementation that `attention.backend` selects on a device.

    Documents that `data.reset_at_document_ends` separates are taken to be as long as the sequence.

    Args:
        config: The run.
        device: The device that computes it.
        sequence_length: Number of tokens; None for that of the config.
        window: The window of a layer; None for a layer without one.
    """
    attention, parallel = config.attention, config.parallel
    length = sequence_length or config.data.sequence_length
    if attention.backend in ("unfused", "cudnn"):
        return attention.backend
    window = None if window is None or window >= length else window
    if device == "gpu" and (window is not None or config.data.reset_at_document_ends):
        fits = uses_varlen(
            backend=attention.backend,
            is_half=config.training.precision == "bfloat16",
            dropout=attention.dropout,
            width=attention.query_key_dim,
        )
        return "varlen" if fits else "fused"
    queries, keys = count_attended_heads(attention, tensor=parallel.tensor, context=parallel.context)
    is_chunked = attention.backend == "auto" and uses_chunks(
        device=device,
        dropout=attention.dropout,
        is_wide=config.training.precision == "float32",
        is_paired=queries == keys,
        length=length,
        window=window,
    )
    if is_chunked:
        return "chunked"
    return "composed" if attention.dropout > 0 and device == "cpu" else "fused"
