"""The backends of core attention agree, forward and backward; chunks are used where they are supported."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sas_megatron.attention.backend import AttentionBackend
from sas_megatron.attention.chunked import attend_chunked, supports_chunks
from sas_megatron.attention.layer import resolve_layer
from sas_megatron.config.errors import FieldError
from sas_megatron.costs.attention_backend import LONGEST_CHUNKED_SEQUENCE
from tests import small_attentions as small
from tests.attention import definitions
from tests.attention.layer_case import drawn
from tests.run_configs import small_config
from tests.tolerances import assert_near


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query and key [S, B, M, E], and value [S, B, M, D]."""
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
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        leaves = inputs(130, torch.float32)
        query, key, value = (x.permute(1, 2, 0, 3) for x in leaves)
        attend_chunked(query, key, value, scale=0.3).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_chunks_are_used_only_for_supported_inputs() -> None:
    query, key, _ = (x.permute(1, 2, 0, 3) for x in inputs(20, torch.float32))
    assert supports_chunks(query, key, dropout=0.0)
    assert not supports_chunks(query, key, dropout=0.1)
    assert not supports_chunks(query.bfloat16(), key.bfloat16(), dropout=0.0)
    assert not supports_chunks(query, key[:, :1], dropout=0.0), "grouped heads"
    assert not supports_chunks(query[:, :, :5], key, dropout=0.0), "fewer queries than keys"
    long = torch.empty(1, 1, LONGEST_CHUNKED_SEQUENCE + 1, 2)
    assert not supports_chunks(long, long, dropout=0.0)


@pytest.mark.parametrize("fields", [small.MHA, small.MLA, small.MFA, small.TPA, small.SAS], ids=str)
def test_cudnn_without_a_gpu_is_rejected_before_a_layer_is_built(
    fields: small.Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    attention = {**fields, "head_dim": 16, "backend": "cudnn"}
    if fields["kind"] == "mla":
        attention |= {"rotary_head_dim": 8}
    variant = small_config(attention=attention, training={"precision": "bfloat16"}).attention
    with pytest.raises(FieldError, match=r"^attention.backend=cudnn: needs a CUDA device; use auto$"):
        resolve_layer(variant).build_spec(variant)


@pytest.mark.parametrize(
    ("fields", "precision", "rule"),
    [
        (
            {"kind": "mha", "head_dim": 12},
            "bfloat16",
            "needs multiples of 8 features, but queries and keys have 12, values 12; "
            "use auto, or multiples of 8",
        ),
        (
            {"kind": "sas", "head_dim": 4, "simulated_head_dim": 8},
            "bfloat16",
            "needs multiples of 8 features, but queries and keys have 8, values 4; "
            "use auto, or multiples of 8",
        ),
        (
            {"kind": "mha", "head_dim": 8},
            "float32",
            "does not support training.precision=float32; use auto, or training.precision=bfloat16",
        ),
        (
            {"kind": "mha", "head_dim": 192},
            "bfloat16",
            "supports at most 128 features, or 192 and 128 (cuDNN 9.11 or newer) or 256 and 256 (cuDNN 9.23 "
            "or newer), but queries and keys have 192, values 192; use auto, or at most 128 features",
        ),
        (
            {"kind": "sas", "head_dim": 64, "simulated_head_dim": 192},
            "bfloat16",
            "supports at most 128 features, or 192 and 128 (cuDNN 9.11 or newer) or 256 and 256 (cuDNN 9.23 "
            "or newer), but queries and keys have 192, values 64; use auto, or at most 128 features",
        ),
        (
            {"kind": "mha", "head_dim": 8, "dropout": 0.1},
            "bfloat16",
            "needs a multiple of 1/16 as attention.dropout, which is 0.1; "
            "use auto, or attention.dropout=0.125",
        ),
    ],
    ids=["keys", "values", "float32", "wide", "wide keys", "dropout"],
)
def test_sizes_and_types_without_cudnn_support_are_rejected_in_the_config(
    fields: dict[str, Any], precision: str, rule: str
) -> None:
    with pytest.raises(FieldError, match=f"^{re.escape(f'attention.backend=cudnn: {rule}')}$"):
        small_config(
            attention={**fields, "num_heads": 4, "backend": "cudnn"}, training={"precision": precision}
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "mha", "head_dim": 128, "dropout": 0.0625},
        {"kind": "mha", "head_dim": 256},
        {"kind": "sas", "head_dim": 128, "simulated_head_dim": 192},
    ],
    ids=str,
)
def test_the_wide_heads_that_torch_supports_are_accepted(fields: dict[str, Any]) -> None:
    attention = {**fields, "num_heads": 4, "backend": "cudnn"}
    assert small_config(attention=attention, training={"precision": "bfloat16"})
    with pytest.raises(FieldError, match=r"backend=cudnn: is not deterministic, and training\.det"):
        small_config(attention=attention, training={"precision": "bfloat16", "deterministic": True})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's attention needs a CUDA device")
@pytest.mark.parametrize("length", [1, 65])
def test_cudnn_supports_values_narrower_than_keys(length: int) -> None:
    shapes = {"query": (2, 6, length, 24), "key": (2, 3, length, 24), "value": (2, 3, length, 16)}
    results = []
    for name, dtype in (("cudnn", torch.bfloat16), ("unfused", torch.float64)):
        backend = AttentionBackend(name, scale=24**-0.5)
        leaves = [
            drawn(name, shape, torch.bfloat16, scale=1.0).to("cuda", dtype).requires_grad_()
            for name, shape in shapes.items()
        ]
        context = backend.attend(*leaves)[..., :16]
        outer = drawn("gradient", context.shape, torch.bfloat16).to("cuda", dtype)
        results.append([context, *torch.autograd.grad(context, leaves, outer)])
    for name, mine, theirs in zip(("context", *shapes), *results, strict=True):
        assert_near(mine, theirs, torch.bfloat16, name)
