"""What bounds a computation on this machine, measured: its copies' bandwidth and its products' rate."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from sas_megatron.benchmarks.timing import time_in_turn

# Several times what caches hold, and products that fill the device.
COPIED_BYTES = {"cuda": 2**32, "cpu": 2**27}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """Bytes read and written, and FLOPs in the benchmark's precision, each a second."""

    copied_bytes_per_second: float
    matrix_flops_per_second: float

    def floor_seconds(self, *, num_bytes: float, flops: float) -> float:
        """What no version takes less than: the larger of both terms."""
        return max(num_bytes / self.copied_bytes_per_second, flops / self.matrix_flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, rounds: int = 7) -> Ceilings:
    """Of a large copy, and of a large square product of random numbers (zeros can be faster)."""
    source = torch.empty(COPIED_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = PRODUCT_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = time_in_turn(
        {
            "copy": lambda: lambda: target.copy_(source),
            "product": lambda: lambda: torch.mm(left, right, out=product),
        },
        device=device,
        rounds=rounds,
    )
    return Ceilings(
        2 * source.numel() / statistics.median(seconds["copy"]),
        2 * side**3 / statistics.median(seconds["product"]),
    )
