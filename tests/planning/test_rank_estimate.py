"""An estimated rank counts the bytes sent, the matrix products and the memory of the real rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activations import count_peak_activation_bytes
from sas_megatron.costs.parameters import chunk_weights
from tests.planning.estimated_ranks import estimated_reports, real_report
from tests.run_configs import small_config
from tests.selection import exhaustive
from tests.training.layouts import ATTENTIONS, LAYOUTS, OVERLAP, SHARDED, TIED

# Small models that cover each kind of parallelism once. The last rank of each stage is estimated.
SMALL: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "selective recompute": (
        1,
        {
            "attention": ATTENTIONS["sas-gather"],
            "training": {"recompute": "selective", "global_batch_size": 6},
        },
    ),
    "tensor 2, sequence": (
        2,
        {
            "attention": ATTENTIONS["sas-all_to_all"],
            "parallel": {"tensor": 2, "sequence": True},
            "training": {"global_batch_size": 6},
        },
    ),
    "context 2, full recompute": (
        2,
        {"attention": ATTENTIONS["gqa"], "parallel": {"context": 2}, "training": {"recompute": "full"}},
    ),
    "pipeline 2, uneven, tied": (
        2,
        {
            "model": {**TIED, "num_layers": 3},
            "parallel": {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 2},
            "training": {"global_batch_size": 8},
        },
    ),
    "pipeline 2 interleaved, data 2, distributed optimizer, overlapped": (
        4,
        {
            "model": {"num_layers": 4},
            "parallel": {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP},
            "optimizer": {"learning_rate": 0.01, **SHARDED},
            "training": {"global_batch_size": 8},
        },
    ),
    "data 2, bfloat16, documents": (
        2,
        {
            "data": {"reset_at_document_ends": True},
            "optimizer": {"learning_rate": 0.01, **SHARDED},
            "training": {"precision": "bfloat16", "global_batch_size": 8},
        },
    ),
}
# Entries of the table of layouts: each kind of parallelism with each attention that it concerns. All their
# ranks are estimated.
LARGE: list[tuple[str, str]] = [
    ("one rank, selective recompute", "sas-gather"),
    ("tensor 2", "mha"),
    ("tensor 2, sequence", "sas-all_to_all"),
    ("pipeline 2, uneven", "gqa"),
    ("pipeline 2, interleaved", "mha"),
    ("context 2", "gqa"),
    ("data 2, overlapped", "mha"),
    ("data 2, distributed optimizer, overlapped", "sas-gather"),
    ("tensor 2, sequence, pipeline 2, tied, selective recompute", "sas-all_to_all"),
    ("tensor 2, sequence, context 2, selective recompute", "sas-gather"),
    ("pipeline 2, context 2, full recompute", "gqa"),
    ("pipeline 2 interleaved, data 2, distributed optimizer, overlapped", "mha"),
    ("tensor 2, sequence, pipeline 2, data 2, distributed optimizer", "sas-all_to_all"),
    ("tensor 2, sequence, pipeline 2 interleaved, context 2", "gqa"),
    ("pipeline 2 tied, context 2, data 2, distributed optimizer", "sas-gather"),
]


@dataclass(frozen=True)
class Case:
    """A run on `world_size` ranks, some of which are estimated."""

    config: RunConfig
    world_size: int
    estimated_ranks: list[int]

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.config.parallel.model_size

    def stage_of(self, rank: int) -> int:
        return rank // (self.world_size // self.config.parallel.pipeline)


def _small(name: str) -> Case:
    world_size, sections = SMALL[name]
    config = small_config(**sections)
    per_stage = world_size // config.parallel.pipeline
    return Case(config, world_size, list(range(per_stage - 1, world_size, per_stage)))


def _large(layout: str, attention: str) -> Case:
    world_size = LAYOUTS[layout].world_size
    return Case(LAYOUTS[layout].config(attention), world_size, list(range(world_size)))


CASES = [
    *(pytest.param(_small(name), id=name) for name in SMALL),
    *(pytest.param(_large(*names), id="-".join(names), marks=exhaustive) for names in LARGE),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: Any) -> Case:
    return request.param


@pytest.fixture(scope="module")
def reports(case: Case, ranks: Any, separate_process: Any) -> list[tuple[Any, Any]]:
    """Real and estimated report of each estimated rank of the case."""
    real = ranks(case.world_size).run(real_report, case.config)
    estimated = separate_process(estimated_reports, case.config, case.estimated_ranks, case.world_size)
    return [(real[rank], report) for rank, report in zip(case.estimated_ranks, estimated, strict=True)]


def test_an_estimated_rank_has_the_groups_and_heads_of_the_real_one(reports: list[tuple[Any, Any]]) -> None:
    for real, estimated in reports:
        assert estimated.rank == real.rank
        assert estimated.group_ranks == real.group_ranks, f"rank {real.rank}"
        assert estimated.num_heads == real.num_heads, f"rank {real.rank}"
        assert estimated.num_microbatches == real.num_microbatches, f"rank {real.rank}"


def test_communication_equals_that_of_gloo_ranks(reports: list[tuple[Any, Any]]) -> None:
    for real, estimated in reports:
        assert estimated.step.rounded_bytes_sent() == real.step.rounded_bytes_sent(), f"rank {real.rank}"
        assert estimated.step.collective_calls == real.step.collective_calls, f"rank {real.rank}"


def test_matrix_products_equal_those_of_real_tensors(reports: list[tuple[Any, Any]]) -> None:
    for real, estimated in reports:
        assert _products(estimated) == _products(real), f"rank {real.rank}"


def _products(report: Any) -> dict[Any, float]:
    return {
        operation: calls
        for operation, calls in report.step.operations.items()
        if operation.kind != "elementwise"
    }


# After an addition in place to a view (in the feature simulation), torch copies the gradient of real tensors
# once more than the gradient of fake tensors.
VIEW_COPIES = 0.06


def test_memory_traffic_is_near_that_of_real_tensors(reports: list[tuple[Any, Any]]) -> None:
    for real, estimated in reports:
        real_bytes, estimated_bytes = (
            sum(operation.traffic_bytes * calls for operation, calls in report.step.operations.items())
            for report in (real, estimated)
        )
        assert estimated_bytes == pytest.approx(real_bytes, rel=VIEW_COPIES), f"rank {real.rank}"


# Small tensors that may or may not be live at the peak: reported losses, partial norms, orders of tokens.
SCALAR_BYTES = 256
# The model chunks of an interleaved stage share an iterator that keeps batches, and gloo keeps a message to
# the next stage until it is sent. Compared with both, these models are small.
IN_TRANSIT_SHARE = 0.03


def test_memory_equals_that_of_real_tensors(reports: list[tuple[Any, Any]]) -> None:
    exact = ("num_layers", "num_parameters", "parameter_bytes", "gradient_bytes", "optimizer_bytes")
    for real, estimated in reports:
        for field in exact:
            assert getattr(estimated, field) == getattr(real, field), f"rank {real.rank}: {field}"
        for field in ("microbatches_peak_bytes", "update_peak_bytes"):
            difference = getattr(estimated, field) - getattr(real, field)
            allowed = SCALAR_BYTES + IN_TRANSIT_SHARE * getattr(real, field)
            assert abs(difference) <= allowed, f"rank {real.rank}: {field} differs by {difference}"


# The padding of the distributed optimizer's buffers is large compared with these models, and a rank does not
# hold an equal share of the weights.
PADDING = 0.6


def test_memory_contains_the_counted_weights_and_activations(
    case: Case, reports: list[tuple[Any, Any]]
) -> None:
    config, parallel = case.config, case.config.parallel
    sharded_by = case.data_parallel * parallel.context if config.optimizer.distributed else 1
    # In addition to two moments, a half-precision weight has a copy in float32.
    state_bytes = 8 if config.training.precision == "float32" else 12
    for _, report in reports:
        stage = case.stage_of(report.rank)
        weights = [
            weight.count_local_elements(parallel.tensor)
            for chunk in range(parallel.virtual_pipeline)
            for weight in chunk_weights(config, stage=stage, chunk=chunk)
        ]
        assert report.num_layers == parallel.layers_of_stages(config.model.num_layers)[stage]
        assert report.num_parameters == sum(weights)
        padding = PADDING * config.optimizer.distributed
        for held, element_bytes in (
            (report.parameter_bytes, config.training.element_bytes),
            (report.gradient_bytes, 4),
            # AdamW has a step counter, a scalar, for each weight.
            (report.optimizer_bytes - 4 * len(weights) / sharded_by, state_bytes / sharded_by),
        ):
            assert held == pytest.approx(element_bytes * sum(weights), rel=padding), f"rank {report.rank}"
        activations = count_peak_activation_bytes(
            config, device="cpu", num_microbatches=report.num_microbatches, stage=stage
        )
        assert report.microbatches_peak_bytes >= report.static_bytes + sum(activations.values())
        assert report.update_peak_bytes >= report.static_bytes
