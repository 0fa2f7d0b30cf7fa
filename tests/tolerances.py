"""The tolerances of all comparisons in one table, each entry with its reason."""

from __future__ import annotations

import math

import torch

# Norm of the difference divided by the norm of the expected tensor. (A single element of a gradient is a sum
# whose terms may cancel, so in bfloat16 its error can be large relative to its value.)
RELATIVE_ERROR: dict[torch.dtype, float] = {
    # Sums of about a hundred terms are computed in another order, with an error of 2e-16 for each term.
    torch.float64: 1e-10,
    # The error of each term is 1e-7. Gradients of the first layer pass through about ten products.
    torch.float32: 2e-5,
    # The definition itself, computed in bfloat16 by one process, has errors of up to 8e-2 in the gradients of
    # operations before the softmax (differences of nearly equal terms), and of 1e-2 in outputs.
    torch.bfloat16: 1e-1,
}

# A fused simulation alone, relative to plain torch in float64 on the same inputs.
KERNEL_ERROR: dict[torch.dtype, float] = {
    torch.float32: 1e-6,
    # Operands and intermediate results are rounded (relative error 2^-9; Triton's interpreter truncates, with
    # 2^-8). Sums are not rounded, since rounding each of a hundred terms would give an error of several per
    # cent.
    torch.bfloat16: 2e-2,
}

# Every parameter's gradient of a full model in float32, between layouts. In one process its error relative to
# float64 is up to 3e-5 (the simulation of keys: softmax ignores a term that all keys share, so its gradients
# are differences that nearly cancel), and both sides have such errors. A missing sum over two ranks gives an
# error of 0.1 or more.
WHOLE_MODEL_GRADIENT = 6e-5

# Loss after 5 optimizer steps in float32, between layouts: Adam's division amplifies rounding errors.
LOSS_AFTER_FIVE_STEPS = 1e-5

# What a run measures in each layer, in float32, between layouts: norms and means of values with the errors
# above. A part of a tensor that is counted twice gives an error of 0.01.
LAYER_MEASUREMENT = 1e-4

# Loss after 5 steps in bfloat16, between two engines that round sums of gradients at different points.
BFLOAT16_LOSS = 2e-3


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference divided by that of `expected`, or infinity if it is not finite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    error = difference / scale if scale > 0 else difference
    return error if math.isfinite(error) else math.inf


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Check that the relative error does not exceed the tolerance of `dtype`; `name` names the tensor."""
    assert_within(RELATIVE_ERROR[dtype], actual, expected, name)


def assert_within(allowed: float, actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Check that the relative error does not exceed `allowed`, an entry of this table."""
    error = relative_error(actual, expected)
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.0e}"
