"""Inputs for the kernels, and how their results are held against plain torch in float64."""

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
    """Parametrize `name` and `dtype`: each case in both dtypes, the ones listed in the default run."""
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
    """Tensors that depend on a seed, each amid NaNs: what reads beside a tensor does not go unnoticed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def tensor(self, *shape: int, scale: float = 0.5) -> torch.Tensor:
        """Normal, rounded to the dtype; a leaf that wants its gradient."""
        drawn = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        amid = torch.full((drawn.numel() + 256,), float("nan"), dtype=self.dtype, device=DEVICE)
        amid[128:-128] = drawn.flatten()
        return amid[128:-128].view(shape).requires_grad_()

    def map_weights(
        self, expand: tuple[int, ...], refine: tuple[int, ...], *, bias: bool
    ) -> ResidualMapWeights:
        """Of a residual map."""
        biases = [self.tensor(expand[0]) if bias else None for _ in range(2)]
        return ResidualMapWeights(self.tensor(*expand), self.tensor(*refine), *biases)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, whatever torch leaves uninitialized is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def kept_tensors() -> Iterator[set[int]]:
    """Within, where in memory the tensors lie that autograd keeps."""
    kept: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def gradients_of(
    function: Callable[[], Sequence[torch.Tensor]], leaves: Sequence[torch.Tensor], seed: int = 7
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The function's results, and the leaves' gradients for random gradients of the results."""
    results = list(function())
    draws = Draws(seed, torch.float64)
    outer = [draws.tensor(*result.shape).detach().to(result.dtype) for result in results]
    return results, list(torch.autograd.grad(results, leaves, outer))


def in_float64(weights: ResidualMapWeights | None) -> ResidualMapWeights | None:
    """The same values as new leaves."""
    if weights is None:
        return None
    return ResidualMapWeights(*(None if weight is None else as_float64(weight) for weight in weights))  # type: ignore[arg-type]


def as_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a new leaf."""
    return tensor.detach().double().requires_grad_()


def leaves_of(*weights: ResidualMapWeights | None) -> list[torch.Tensor]:
    """The tensors that there are."""
    return [leaf for each in weights if each is not None for leaf in each if leaf is not None]


def assert_all_near(
    actual: tuple[list[torch.Tensor], list[torch.Tensor]],
    expected: tuple[list[torch.Tensor], list[torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """Results and gradients."""
    for what, mine, theirs in zip(("result", "gradient"), actual, expected, strict=True):
        assert len(mine) == len(theirs)
        for place, (tensor, other) in enumerate(zip(mine, theirs, strict=True)):
            assert tensor.dtype == dtype
            assert_within(KERNEL_ERROR[dtype], tensor, other, f"{what} {place}")
