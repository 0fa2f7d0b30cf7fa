"""`attention.kernel=auto`: when the simulation runs in fused kernels, by rules that need no torch."""

from __future__ import annotations

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.fused.tiling import TILE_ROWS, padded, split
from sas_megatron.config.attention_backend import Device

# What a program may use of a multiprocessor of compute capability 9.0 (H100, H200), by its data sheet.
SHARED_MEMORY_BYTES = 227 * 1024
ELEMENT_BYTES = 2


def is_fused(attention: SimulatedAttentionConfig, *, device: Device, element_bytes: int) -> bool:
    """What `attention.kernel` comes to, where all that fused kernels need is installed."""
    if attention.kernel == "auto":
        return reason_not_to_fuse(attention, device=device, element_bytes=element_bytes) is None
    return attention.kernel == "fused"


def reason_not_to_fuse(
    attention: SimulatedAttentionConfig, *, device: Device, element_bytes: int
) -> str | None:
    """Why `attention.kernel=auto` leaves the simulation to torch's own operations; None: it does not."""
    if device == "cpu":
        return "the fused kernels need a CUDA device"
    if element_bytes != ELEMENT_BYTES:
        return "the fused kernels are made for bfloat16"
    return reason_not_to_fit(attention)


def reason_not_to_fit(attention: SimulatedAttentionConfig) -> str | None:
    """Why the kernels cannot hold all weights and a tile on chip; None: they can."""
    for what, needed in count_shared_memory_bytes(attention).items():
        if needed > SHARED_MEMORY_BYTES:
            return (
                f"the fused {what} would need {needed // 1024} KiB of shared memory "
                f"and there are {SHARED_MEMORY_BYTES // 1024}"
            )
    return None


def count_shared_memory_bytes(attention: SimulatedAttentionConfig) -> dict[str, int]:
    """Of the backward kernels, which need the most: all weights, and tiles of what they read and make.

    Held against the compiler's own count in tests/attention/fused, which it must not fall short of.
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
