"""Tables of `estimate` and `bench` fit into 80 columns, even with long names and large figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sas_megatron.cli import bench_tables as tables
from sas_megatron.cli.estimate_tables import show_estimate, show_search, show_validation

PARAMETERS = 7_654_321_098
BYTES = 1_234 * 2**30
STEP = {
    "seconds": 1234.5678,
    "seconds_by_term": {"compute": 1234.5, "pipeline": 0.06, "context": 1.234e-06, "bubble": 0.007},
    "pipeline_bubble": 0.4375,
    "tokens_per_second": 123_456_789.0,
    "model_flops_utilization": 0.456,
}
HARDWARE = {"hardware": "NVIDIA H200 SXM 141 GB", "memory_bytes": BYTES}
LONGEST_OPERATION = "allgather_into_tensor_coalesced"
SENT = {
    "context": {LONGEST_OPERATION: BYTES, "reduce_scatter_tensor_coalesced": BYTES},
    "pipeline": {"send": 3},
}


SAVINGS = {
    "output_loss": "chunked",
    "logits_bytes": BYTES,
    "logits_seconds": 123.45,
    "device_reads": 1,
    "saved_device_reads": 12_345,
    "saved_read_seconds": 0.12345,
    "host_bytes": BYTES,
    "hidden_read_seconds": 1.2345,
}


def estimate_of_large_ranks() -> dict[str, Any]:
    rank = {
        "layers": 128,
        "attended_heads": 1024,
        "parameters": PARAMETERS,
        "parameter_bytes": BYTES,
        "gradient_bytes": BYTES,
        "optimizer_bytes": BYTES,
        "peak_activation_bytes": BYTES,
        "peak_bytes": BYTES,
        "microbatches": 1_024,
        "flops": 1.234e18,
        "communication_bytes_sent": SENT,
    }
    return {
        "world_size": 16_384,
        "data_parallel": 1_024,
        **HARDWARE,
        "ranks": [{**rank, "rank": number} for number in (0, 10_000, 16_000)],
        "needed_bytes_with_allocator_and_reserve": BYTES,
        "fits": False,
        "step": STEP,
        "savings": SAVINGS,
    }


def validation_of_large_ranks() -> dict[str, Any]:
    sent = {"pipeline": {"send": 123_456_789_012}}
    rank = {
        "rank": 7,
        "communication_bytes_sent": {"estimated": sent, "measured": {"pipeline": {"send": 1}}},
        "peak_bytes": {"estimated": 2**40, "measured": 2**40, "error": -0.1234},
    }
    seconds = {"estimated": 1234.567, "measured": 1234.567, "error": 12.345}
    return {"ranks": [rank], "step_seconds": seconds}


def search_of_large_models() -> dict[str, Any]:
    layout = {"overrides": ["parallel.tensor=8"], "needed_bytes": BYTES, "loses_by": None, **STEP}
    counts = {"legal_layouts": 12_345, "families": 1_234, "estimated_families": 123}
    return {**HARDWARE, **counts, "layouts": [layout] * 20}


BLOCKS = ("sas", "literal", "literal_compiled", "multi_head")
KERNEL = "feature_expand_gradient"
TILE = {"kernel": KERNEL, "rows": 128, "warps": 16, "stages": 2, "programs": 2}
ATTENTION = {
    "seconds": dict.fromkeys(BLOCKS, 12.3456),
    "fused_attention": dict.fromkeys(BLOCKS, "fused_attention_overrideable"),
    "literal_over_sas": 12.345,
    "literal_compiled_over_sas": 12.345,
    "sas_over_multi_head": 12.345,
    "kept_share_of_literal": 0.987,
    "peak_share_of_literal": None,
}
SIMULATION = {
    "rows": {"plain backward": {"seconds": 12.3456, "over_floor": 123.45}},
    "plain_over_fused": {"backward": 12.345},
    "ceilings": {"copied_bytes_per_second": 4.8e12, "matrix_flops_per_second": 9.894e14},
    "sweep": [{**TILE, "seconds": 12.3456}, {**TILE, "kernel": "head_forward", "seconds": 12.3456}],
}
STEP_COMPARISON = {
    "rows": {
        f"configs/{name}": {"seconds": 123.45, "flops_utilization": 0.45, "flops_utilization_causal": 0.4}
        for name in ("a", "b")
    },
    **dict.fromkeys(("parameter_ratio", "time_ratio", "flops_ratio", "time_over_flops"), 12.345),
    "peak_flops_per_second": 9.894e14,
    "peak_is_of": "data sheet, NVIDIA H100 SXM5 80 GB",
}
LOOP = {"seconds": {"loop: the rest": 12.345}, "share_of_step": 0.1234}
READ_DELAY = {
    "delay_seconds": 0.005,
    "samples_per_step": 12_345,
    "plain_seconds": 123.456,
    "delayed_seconds": 1234.567,
    "ratio": 12.345,
}
DATA = {
    "workers": 128,
    "prepare_tokens_per_second": 1.234e9,
    "bare_tokens_per_second": 1.234e9,
    "ratio": 0.987,
    "command_seconds": 1234.56,
    "megatron_lm_seconds": 12345.67,
    "peak_memory_bytes": 2**40,
    "peak_memory_bytes_of_triple": 2**40,
}
CHECKPOINT = {
    "seconds": dict.fromkeys(("copy", "blocked", "save", "unhashed", "dd"), 1234.567),
    "blocked_over_copy": 12.345,
    "hashing_exposed": 0.123,
    "save_rate_over_dd": 12.345,
}
SCORING = {kind: {"scoring": 1.234e6, "bare": 1.234e6, "ratio": 0.987} for kind in ("choices", "texts")}
MACHINE = {"machine": {"processor": "x86_64"}, "date": "2026-11-29"}


def _show_bench(rows: Callable[[dict[str, Any]], tables.Rows], result: dict[str, Any]) -> None:
    tables.show({**result, **MACHINE}, rows(result), as_json=False)


CASES: dict[str, Callable[[], None]] = {
    "estimate": lambda: show_estimate(estimate_of_large_ranks()),
    "estimate --validate": lambda: show_validation(validation_of_large_ranks()),
    "estimate --search": lambda: show_search(search_of_large_models()),
    "bench attention": lambda: _show_bench(tables.attention_rows, ATTENTION),
    "bench simulation": lambda: _show_bench(tables.simulation_rows, SIMULATION),
    "bench step": lambda: _show_bench(tables.step_rows, STEP_COMPARISON),
    "bench loop": lambda: _show_bench(tables.loop_rows, LOOP),
    "bench loop --read-delay-ms": lambda: _show_bench(tables.read_delay_rows, READ_DELAY),
    "bench data": lambda: _show_bench(tables.data_rows, DATA),
    "bench checkpoint": lambda: _show_bench(tables.checkpoint_rows, CHECKPOINT),
    "bench scoring": lambda: _show_bench(tables.scoring_rows, SCORING),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_fit_into_80_columns_without_breaking_a_cell(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = {}
    for columns in (80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        CASES[case]()
        printed[columns] = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed[80].splitlines())
    # A wider terminal changes no line of a table; sentences below the tables are wrapped differently.
    assert _table_lines(printed[80]) == _table_lines(printed[200]) != []


def _table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line[:1] in set("│┃┏┡├└")]
