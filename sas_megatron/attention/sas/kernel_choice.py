"""Whether the simulation runs in fused kernels, decided by `attention.kernel` and sizes. No torch."""

from __future__ import annotations

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.fused.tiling import TILE_ROWS, padded, split
from sas_megatron.costs.attention_backend import Device

# Shared memory that a program may use on a multiprocessor of compute capability 9.0 (H100, H200 data sheet).
SHARED_MEMORY_BYTES = 227 * 1024
ELEMENT_BYTES = 2


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
        few, many = padded(base), padded(attention.head_expansion * base)
        rows = max(TILE_ROWS, padded(attention.head_dim))
        weights = attention.kernel_size * many * (few + many)
        tiles = rows * (2 * many + few)
        needed["head simulation"] = max(needed.get("head simulation", 0), ELEMENT_BYTES * (weights + tiles))
    if attention.simulate_features:
        narrow, (main, rest) = padded(attention.head_dim), split(attention.query_key_dim)
        wide = main + rest
        needed["feature simulation"] = ELEMENT_BYTES * (wide * (narrow + wide) + TILE_ROWS * (narrow + main))
    return needed
