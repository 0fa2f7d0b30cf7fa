"""Estimates agree with real processes: bytes sent exactly, resident memory within a tenth."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.planning.rank_processes import run_on_ranks
from tests.planning.forked_ranks import fork_ranks
from tests.run_configs import small_config
from tests.selection import exhaustive
from tests.training.layouts import ATTENTIONS

MEMORY_ERROR = 0.1
# In a small model, the messages that gloo has not sent yet take a large share.
SMALL_MEMORY_ERROR = 0.5
LARGE = small_config(
    model={"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 8192},
    attention={**ATTENTIONS["sas-gather"], "num_heads": 8, "head_dim": 32},
    parallel={"tensor": 2, "sequence": True},
    data={"sequence_length": 512},
    training={"global_batch_size": 8, "micro_batch_size": 4},
    optimizer={"learning_rate": 0.01, "distributed": True},
)
# Its ranks take some tens of megabytes.
SMALL = small_config(
    model={"hidden_size": 128, "ffn_hidden_size": 256, "vocab_size": 4096},
    attention={**ATTENTIONS["gqa"], "head_dim": 32},
    parallel={"tensor": 2, "sequence": True},
    data={"sequence_length": 128},
    optimizer={"learning_rate": 0.01, "distributed": True},
)


def _measure_briefly(config: RunConfig) -> dict[str, Any]:
    """Measure a rank like `validate_estimate`, but with few steps and short measurements of the machine."""
    from sas_megatron.planning import machine_measurement, validation

    machine_measurement.MEASURED_SECONDS = 0.01
    validation.TIMED_STEPS = 2
    return validation._measure_rank(config)


def _validate(config: RunConfig, world_size: int, measured: list[dict[str, Any]] | None = None) -> Any:
    """Validate on the given measurements, or on ranks that this process starts.

    The process must not have joined a process group.
    """
    from sas_megatron.planning import validation

    def return_measured(
        function: Any, measured_config: RunConfig, *, world_size: int
    ) -> list[dict[str, Any]]:
        assert (function, measured_config) == (validation._measure_rank, config)
        assert measured is not None
        assert len(measured) == world_size
        return measured

    with pytest.MonkeyPatch.context() as patch:
        if measured is not None:
            patch.setattr(validation, "run_on_ranks", return_measured)
        return validation.validate_estimate(config, world_size=world_size)


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Measurements of two forked ranks."""
    with pytest.MonkeyPatch.context() as patch:
        fork_ranks(patch)
        return run_on_ranks(_measure_briefly, SMALL, world_size=2)


@pytest.fixture(scope="module")
def validation(separate_process: Any, measured: list[dict[str, Any]]) -> Any:
    return separate_process(_validate, SMALL, 2, measured)


def test_bytes_sent_are_estimated_exactly(validation: Any) -> None:
    assert len(validation.ranks) == 2
    for rank in validation.ranks:
        assert rank.measured_bytes_sent["tensor"]
        assert rank.communication_is_equal


def test_the_memory_error_compares_peak_memory_with_the_growth_of_the_process(validation: Any) -> None:
    for rank in validation.ranks:
        assert abs(rank.memory_error) < SMALL_MEMORY_ERROR, f"rank {rank.rank}: {rank.memory_error:+.1%}"
        assert rank.memory_error == pytest.approx(rank.estimated_peak_bytes / rank.measured_peak_bytes - 1)


# Beside other processes the resident memory exceeds that of the tensors by up to a tenth. It is never
# smaller, so the smallest of up to three measurements is the nearest.
MEMORY_ROUNDS = 3


@exhaustive
def test_estimated_peak_memory_is_within_a_tenth_of_the_growth_of_the_process(separate_process: Any) -> None:
    for _ in range(MEMORY_ROUNDS):
        ranks = separate_process(_validate, LARGE, 2).ranks
        assert all(rank.communication_is_equal for rank in ranks)
        assert all(rank.measured_peak_bytes > 200 * 2**20 for rank in ranks)
        if all(abs(rank.memory_error) < MEMORY_ERROR for rank in ranks):
            return
    pytest.fail(", ".join(f"rank {rank.rank}: {rank.memory_error:+.1%}" for rank in ranks))


def test_the_time_error_compares_the_estimate_with_the_slowest_rank(
    validation: Any, measured: list[dict[str, Any]]
) -> None:
    # The error itself has no bound, since this machine may be busy.
    slowest = max(rank["step_seconds"] for rank in measured)
    assert validation.measured_step_seconds == slowest > 0
    assert validation.step.seconds > 0
    assert validation.time_error == pytest.approx(validation.step.seconds / slowest - 1)


def test_more_than_eight_ranks_are_an_error() -> None:
    with pytest.raises(UserError, match="8 at most"):
        _validate(small_config(training={"global_batch_size": 16, "micro_batch_size": 1}), 16)


def _fail_on_rank_1() -> None:
    import time

    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError(f"local rank {os.environ['LOCAL_RANK']}, {torch.get_num_threads()} threads")
    time.sleep(60)


def test_a_failing_rank_ends_the_others_and_reports_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="rank 1 failed") as failure:
        run_on_ranks(_fail_on_rank_1, world_size=2, threads=2)
    assert "ValueError: local rank 1, 2 threads" in str(failure.value)
    assert not [
        child for child in multiprocessing.active_children() if child.name.startswith("measured rank")
    ]
