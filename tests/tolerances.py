"""How near two results must be; one table, each entry with its reason."""

from __future__ import annotations

import math

import torch

# Norm of the difference over the norm of the expected tensor. (Single elements of a gradient are sums
# that may cancel, so in bfloat16 they carry errors out of proportion to their own size.)
RELATIVE_ERROR: dict[torch.dtype, float] = {
    # The same sums in another order, some hundred terms deep, at 2e-16 each.
    torch.float64: 1e-10,
    # As float64, at 1e-7 each; gradients of the first layer pass some ten products.
    torch.float32: 2e-5,
    # The definition itself, computed in bfloat16 by one process, errs by up to 8e-2 in the gradients of
    # what comes before the softmax (differences of nearly equal terms), by 1e-2 in outputs.
    torch.bfloat16: 1e-1,
}

# A fused simulation alone, against plain torch in float64 on the same inputs.
KERNEL_ERROR: dict[torch.dtype, float] = {
    torch.float32: 1e-6,
    # Operands, and what goes from one product into the next, are rounded by 2^-9 (in Triton's interpreter cut
    # off, by 2^-8); sums are not. Were they, at each of a hundred terms, they would err by several per cent.
    torch.bfloat16: 2e-2,
}

# Every parameter's gradient of a whole model in float32, between layouts. In one process it errs by up to
# 3e-5 against float64 (the simulation of keys: softmax ignores what all keys share, so its gradients are
# differences that nearly cancel), and both sides err. A missing sum over two ranks errs by 0.1 or more.
WHOLE_MODEL_GRADIENT = 6e-5

# Loss after 5 optimizer steps in float32 between layouts: Adam's division amplifies rounding.
LOSS_AFTER_FIVE_STEPS = 1e-5


# The same in bfloat16 between two engines, which round sums of gradients at other places.
BFLOAT16_LOSS = 2e-3


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`; infinite where something is not finite."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    error = difference / scale if scale > 0 else difference
    return error if math.isfinite(error) else math.inf


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Fails with `what` and the error found where it exceeds the table's for `dtype`."""
    assert_within(RELATIVE_ERROR[dtype], actual, expected, what)


def assert_within(allowed: float, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fails with `what` and the error found where it exceeds `allowed`, an entry of this table."""
    error = relative_error(actual, expected)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.0e}"
