"""How near two results must be; one table, each entry with its reason."""

from __future__ import annotations

import torch

# Largest difference over largest magnitude of the expected tensor.
RELATIVE_ERROR: dict[torch.dtype, float] = {
    # The same sums in another order, some hundred terms deep, at 2e-16 each.
    torch.float64: 1e-10,
    # As float64, at 1e-7 each; gradients of the first layer pass some ten products.
    torch.float32: 2e-5,
    # 8 bits of mantissa: each product rounds to 4e-3, and results round again where layouts cut them.
    torch.bfloat16: 4e-2,
}

# Loss after 5 optimizer steps in float32 between layouts: Adam's division amplifies rounding.
LOSS_AFTER_FIVE_STEPS = 1e-5


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of `expected`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale > 0 else difference


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Fails with `what` and the error found where it exceeds the table's for `dtype`."""
    error = relative_error(actual, expected)
    assert error <= RELATIVE_ERROR[dtype], f"{what}: relative error {error:.2e}, allowed {RELATIVE_ERROR[dtype]:.0e}"
