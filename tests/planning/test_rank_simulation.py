"""A simulated rank counts what the real one does: bytes on the wire, products, memory."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.planning.simulated_ranks import real_report, simulated_reports
from tests.run_configs import small_config

MHA: dict[str, Any] = {"kind": "mha", "num_heads": 4, "head_dim": 6}
GQA: dict[str, Any] = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
GATHER: dict[str, Any] = {"kind": "sas", "num_heads": 4, "head_dim": 6, "exchange": "gather"}
ALL_TO_ALL: dict[str, Any] = {**GATHER, "head_expansion": 2, "exchange": "all_to_all"}
DISTRIBUTED: dict[str, Any] = {"optimizer": {"learning_rate": 0.01, "distributed": True}}
BFLOAT16 = {"training": {"precision": "bfloat16", "global_batch_size": 8}}

# world size, attention, parallel, further sections
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "alone": (1, MHA, {}, {}),
    "tensor-mha": (2, MHA, {"tensor": 2}, {}),
    "tensor-gqa-bfloat16": (2, GQA, {"tensor": 2}, BFLOAT16),
    "tensor-gather": (2, GATHER, {"tensor": 2}, {}),
    "tensor-all_to_all-sequence": (2, ALL_TO_ALL, {"tensor": 2, "sequence": True}, {}),
    "context": (2, GQA, {"context": 2}, {}),
    "data": (2, MHA, {}, {}),
    "data-distributed": (2, GATHER, {}, DISTRIBUTED),
    "data-distributed-bfloat16-accumulated": (2, MHA, {}, {**DISTRIBUTED, **BFLOAT16}),
    "tied-biased-documents": (
        2,
        MHA,
        {"tensor": 2},
        {
            "model": {"tie_embeddings": True, "linear_bias": True, "normalization": "layernorm"},
            "data": {"reset_at_document_ends": True},
        },
    ),
    "tensor-context-sequence": (4, GATHER, {"tensor": 2, "context": 2, "sequence": True}, {}),
    "tensor-data-distributed-accumulated": (
        4,
        ALL_TO_ALL,
        {"tensor": 2, "sequence": True},
        {**DISTRIBUTED, "training": {"global_batch_size": 8}},
    ),
    "tensor-context-data": (8, ALL_TO_ALL, {"tensor": 2, "context": 2, "sequence": True}, DISTRIBUTED),
    "tensor-8": (8, {**GATHER, "num_heads": 8, "num_kv_heads": 4}, {"tensor": 8}, {}),
}


def config_of(case: str) -> RunConfig:
    _, attention, parallel, sections = CASES[case]
    model = {"hidden_size": 24, "ffn_hidden_size": 40, "vocab_size": 48, "vocab_multiple": 8}
    sections = {**sections, "model": {**model, **sections.get("model", {})}}
    return small_config(attention=attention, parallel=parallel, **sections)


@pytest.fixture(scope="module", params=CASES)
def reports(request: Any, ranks: Any, simulator: Any) -> list[tuple[Any, Any]]:
    """Real and simulated report of each rank of a case."""
    config, world_size = config_of(request.param), CASES[request.param][0]
    real = ranks(world_size).run(real_report, config)
    simulated = simulator(simulated_reports, config, list(range(world_size)), world_size)
    return list(zip(real, simulated, strict=True))


def test_bytes_and_calls_on_the_wire_are_those_of_gloo_ranks(reports: list[tuple[Any, Any]]) -> None:
    for real, simulated in reports:
        assert simulated.step.rounded_wire_bytes() == real.step.rounded_wire_bytes(), f"rank {real.rank}"
        assert simulated.step.wire_calls == real.step.wire_calls, f"rank {real.rank}"


def test_products_are_those_of_real_tensors(reports: list[tuple[Any, Any]]) -> None:
    for real, simulated in reports:
        assert _products(simulated) == _products(real), f"rank {real.rank}"


def _products(report: Any) -> dict[Any, float]:
    return {
        operation: calls
        for operation, calls in report.step.operations.items()
        if operation.kind != "elementwise"
    }


# Where something was added in place to a view (in the feature simulation), the gradient of real tensors
# passes through one copy more than that of fake ones.
VIEW_COPIES = 0.06


def test_memory_traffic_is_that_of_real_tensors(reports: list[tuple[Any, Any]]) -> None:
    for real, simulated in reports:
        of_real, of_simulated = (
            sum(operation.traffic_bytes * calls for operation, calls in report.step.operations.items())
            for report in (real, simulated)
        )
        assert of_simulated == pytest.approx(of_real, rel=VIEW_COPIES), f"rank {real.rank}"


# Small, and alive at the peak or not: losses reported so far, parts of the norm, token orders.
SCALAR_BYTES = 256


def test_memory_is_that_of_real_tensors(reports: list[tuple[Any, Any]]) -> None:
    exact = ("num_layers", "num_parameters", "parameter_bytes", "gradient_bytes", "optimizer_bytes")
    for real, simulated in reports:
        for field in exact:
            assert getattr(simulated, field) == getattr(real, field), f"rank {real.rank}: {field}"
        for field in ("microbatches_peak_bytes", "update_peak_bytes"):
            difference = getattr(simulated, field) - getattr(real, field)
            assert abs(difference) <= SCALAR_BYTES, f"rank {real.rank}: {field} differs by {difference}"
