"""Inputs for the kernels, and the comparison of their results with plain torch in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence

import pytest
import torch

from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights
from tests.selection import exhaustive
from tests.tolerances import KERNEL_ERROR, assert_within

# On a machine without a GPU Triton's interpreter runs the kernels (tests/conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases_in_dtypes(
    names: Collection[str], *, float32: Collection[str], bfloat16: Collection[str]
) -> pytest.MarkDecorator:
    """Parametrize `name` and `dtype`: each case in both dtypes; the listed ones are in the default run."""
    default = {torch.float32: float32, torch.bfloat16: bfloat16}
    assert set(names) >= {*float32, *bfloat16}, "the default run has a case that is not in the table"
    parameters = [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=() if name in default[dtype] else exhaustive,
        )
        for name in names
        for dtype in default
    ]
    return pytest.mark.parametrize(("name", "dtype"), parameters)


class Draws:
    """Random tensors from a seed, with NaNs before and after each in memory to detect reads out of bounds."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def tensor(self, *shape: int, scale: float = 0.5) -> torch.Tensor:
        """Return a leaf with normal values, rounded to the dtype, that requires a gradient."""
        drawn = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        padded = torch.full((drawn.numel() + 256,), float("nan"), dtype=self.dtype, device=DEVICE)
        padded[128:-128] = drawn.flatten()
        return padded[128:-128].view(shape).requires_grad_()

    def map_weights(
        self, expand: tuple[int, ...], refine: tuple[int, ...], *, bias: bool
    ) -> ResidualMapWeights:
        """Return random weights of a residual map with these shapes."""
        biases = [self.tensor(expand[0]) if bias else None for _ in range(2)]
        return ResidualMapWeights(self.tensor(*expand), self.tensor(*refine), *biases)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch leaves uninitialized with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def saved_addresses() -> Iterator[set[int]]:
    """Yield the set of addresses of the tensors that autograd saves within the block."""
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def gradients_of(
    function: Callable[[], Sequence[torch.Tensor]], leaves: Sequence[torch.Tensor], seed: int = 7
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the results, and the gradients of the leaves for random gradients of the results."""
    results = list(function())
    draws = Draws(seed, torch.float64)
    outer = [draws.tensor(*result.shape).detach().to(result.dtype) for result in results]
    return results, list(torch.autograd.grad(results, leaves, outer))


def in_float64(weights: ResidualMapWeights | None) -> ResidualMapWeights | None:
    """Return the same values as new leaves in float64."""
    if weights is None:
        return None
    return ResidualMapWeights(*(None if weight is None else as_float64(weight) for weight in weights))  # type: ignore[arg-type]


def as_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values as a new leaf in float64."""
    return tensor.detach().double().requires_grad_()


def leaves_of(*weights: ResidualMapWeights | None) -> list[torch.Tensor]:
    """Return all tensors of the weights."""
    return [leaf for each in weights if each is not None for leaf in each if leaf is not None]


def assert_all_near(
    actual: tuple[list[torch.Tensor], list[torch.Tensor]],
    expected: tuple[list[torch.Tensor], list[torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """Compare results and gradients of the kernels with the expected ones."""
    for kind, actual_tensors, expected_tensors in zip(("result", "gradient"), actual, expected, strict=True):
        assert len(actual_tensors) == len(expected_tensors)
        for index, (tensor, other) in enumerate(zip(actual_tensors, expected_tensors, strict=True)):
            assert tensor.dtype == dtype
            assert_within(KERNEL_ERROR[dtype], tensor, other, f"{kind} {index}")
