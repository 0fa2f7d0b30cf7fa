"""The core attention's back ends compute the same, forward and backward; chunks are used where they fit."""

from __future__ import annotations

import pytest
import torch

from sas_megatron.attention.chunked import attend_chunked, suits_chunks
from sas_megatron.attention.grouped import MultiHeadAttentionConfig
from sas_megatron.config.attention_backend import LONGEST_CHUNKED_SEQUENCE
from sas_megatron.config.errors import FieldError
from tests.attention import definitions
from tests.attention.layer_case import drawn
from tests.tolerances import assert_near


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key [S, B, M, E] and value [S, B, M, D]."""
    shapes = {"query": (length, 2, 3, 10), "key": (length, 2, 3, 10), "value": (length, 2, 3, 7)}
    return [drawn(name, shape, dtype, scale=1.0).requires_grad_() for name, shape in shapes.items()]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_chunks_of_queries_compute_causal_attention(length: int) -> None:
    expected_inputs, actual_inputs = inputs(length, torch.float64), inputs(length, torch.float64)
    expected = definitions.attend(*expected_inputs)
    query, key, value = (x.permute(1, 2, 0, 3) for x in actual_inputs)
    actual = attend_chunked(query, key, value, scale=10**-0.5).permute(2, 0, 1, 3)
    assert_near(actual, expected, torch.float64, "context")
    gradient = drawn("gradient", expected.shape, torch.float64)
    expected.backward(gradient)
    actual.backward(gradient)
    for name, mine, theirs in zip(("query", "key", "value"), actual_inputs, expected_inputs, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_near(mine.grad, theirs.grad, torch.float64, f"{name} gradient")


def test_chunks_read_no_uninitialized_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)  # fills what is not initialized with NaN
    try:
        leaves = inputs(130, torch.float32)
        query, key, value = (x.permute(1, 2, 0, 3) for x in leaves)
        attend_chunked(query, key, value, scale=0.3).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_chunks_serve_only_what_they_compute() -> None:
    query, key, _ = (x.permute(1, 2, 0, 3) for x in inputs(20, torch.float32))
    assert suits_chunks(query, key, causal=True, dropout=0.0)
    assert not suits_chunks(query, key, causal=False, dropout=0.0)
    assert not suits_chunks(query, key, causal=True, dropout=0.1)
    assert not suits_chunks(query.bfloat16(), key.bfloat16(), causal=True, dropout=0.0)
    assert not suits_chunks(query, key[:, :1], causal=True, dropout=0.0), "grouped heads"
    assert not suits_chunks(query[:, :, :5], key, causal=True, dropout=0.0), "fewer queries than keys"
    long = torch.empty(1, 1, LONGEST_CHUNKED_SEQUENCE + 1, 2)
    assert not suits_chunks(long, long, causal=True, dropout=0.0)


def test_cudnn_without_a_gpu_is_refused_before_a_layer_is_built() -> None:
    variant = MultiHeadAttentionConfig(num_heads=4, head_dim=6, backend="cudnn")
    with pytest.raises(FieldError, match=r"^attention.backend=cudnn: needs a CUDA device; use auto$"):
        variant.build_spec()
