"""The choice between fused and plain kernels of SAS, by support and by the sizes of tiles. No torch."""

from __future__ import annotations

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.costs.attention_backend import Device

# Shared memory that a program may use on a multiprocessor of compute capability 9.0 (H100, H200 data sheet).
SHARED_MEMORY_BYTES = 227 * 1024
# Bytes of a bfloat16, the dtype of the fused kernels.
ELEMENT_BYTES = 2
# Largest partial sum, in float32, that one program of a fused kernel can accumulate next to its tiles.
LARGEST_SUM_BYTES = 64 * 1024
# Smallest side of a matrix product in Triton.
SMALLEST_TILE_SIDE = 16
# Default rows of a tile of the fused kernels.
TILE_ROWS = 128


def is_fused(attention: SimulatedAttentionConfig, *, device: Device, element_bytes: int) -> bool:
    """Return whether `attention.kernel` selects the fused kernels, if everything they need is installed."""
    if attention.kernel == "auto":
        return find_unfused_reason(attention, device=device, element_bytes=element_bytes) is None
    return attention.kernel == "fused"


def find_unfused_reason(
    attention: SimulatedAttentionConfig, *, device: Device, element_bytes: int
) -> str | None:
    """Return why `attention.kernel=auto` does not select the fused kernels; None if it does."""
    if device == "cpu":
        return "the fused kernels need a CUDA device"
    if element_bytes != ELEMENT_BYTES:
        return "the fused kernels are made for bfloat16"
    if attention.unfusable_field is not None:
        return f"the fused kernels do not support {attention.unfusable_field}"
    return find_misfit(attention)


def find_misfit(attention: SimulatedAttentionConfig) -> str | None:
    """Return why all weights and a tile do not fit in shared memory; None if they do."""
    for simulation, needed in count_shared_memory_bytes(attention).items():
        if needed > SHARED_MEMORY_BYTES:
            return (
                f"the fused {simulation} needs {needed // 1024} KiB of shared memory, "
                f"of which there are {SHARED_MEMORY_BYTES // 1024}"
            )
    return None


def count_shared_memory_bytes(attention: SimulatedAttentionConfig) -> dict[str, int]:
    """Return the shared memory of the backward kernels, which need the most, by simulation.

    Counted are all weights, and the tiles of inputs and results. tests/attention/fused checks that the
    count is at least the compiler's.
    """
    needed: dict[str, int] = {}
    for base in attention.head_simulations().values():
        few, many = padded_size(base), padded_size(attention.head_expansion * base)
        rows = max(TILE_ROWS, padded_size(attention.head_dim))
        weights = attention.kernel_size * many * (few + many)
        tiles = rows * (2 * many + few)
        needed["head simulation"] = max(needed.get("head simulation", 0), ELEMENT_BYTES * (weights + tiles))
    if attention.simulate_features:
        narrow, (main, rest) = padded_size(attention.head_dim), split_size(attention.query_key_dim)
        wide = main + rest
        needed["feature simulation"] = ELEMENT_BYTES * (wide * (narrow + wide) + TILE_ROWS * (narrow + main))
    return needed


def padded_size(size: int) -> int:
    """Return the side of a tile for `size` elements: the next power of two, at least `SMALLEST_TILE_SIDE`."""
    return max(SMALLEST_TILE_SIDE, 1 << (size - 1).bit_length())


def split_size(size: int) -> tuple[int, int]:
    """Return two powers of two that cover `size` columns with less padding than one; the second may be 0."""
    main = max(SMALLEST_TILE_SIDE, 1 << (size.bit_length() - 1))
    return (main, 0) if size <= main else (main, padded_size(size - main))


def taps_at_once(taps: int, *, num_outputs: int, num_inputs: int) -> int:
    """Return the number of taps whose gradients one program accumulates: all taps if they fit, otherwise one.

    Args:
        taps: Taps of the second convolution.
        num_outputs: Its local output heads.
        num_inputs: Its input heads, which are all simulated heads.
    """
    return taps if 4 * taps * padded_size(num_outputs) * padded_size(num_inputs) <= LARGEST_SUM_BYTES else 1
