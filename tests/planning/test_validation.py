"""Estimates against real processes: wire to the byte, resident memory within a tenth."""

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
# Of a small model, beside what gloo has not sent yet.
SMALL_MEMORY_ERROR = 0.5
LARGE = small_config(
    model={"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 8192},
    attention={**ATTENTIONS["sas-gather"], "num_heads": 8, "head_dim": 32},
    parallel={"tensor": 2, "sequence": True},
    data={"sequence_length": 512},
    training={"global_batch_size": 8, "micro_batch_size": 4},
    optimizer={"learning_rate": 0.01, "distributed": True},
)
# Of some tens of megabytes.
SMALL = small_config(
    model={"hidden_size": 128, "ffn_hidden_size": 256, "vocab_size": 4096},
    attention={**ATTENTIONS["gqa"], "head_dim": 32},
    parallel={"tensor": 2, "sequence": True},
    data={"sequence_length": 128},
    optimizer={"learning_rate": 0.01, "distributed": True},
)


def _measure_in_little_time(config: RunConfig) -> dict[str, Any]:
    """On a rank: what `validate_estimate` measures, from few steps and short measurements of the machine."""
    from sas_megatron.planning import machine_measurement, validation

    machine_measurement.MEASURED_SECONDS = 0.01
    validation.TIMED_STEPS = 2
    return validation._measure_rank(config)


def _validate(config: RunConfig, world_size: int, measured: list[dict[str, Any]] | None = None) -> Any:
    """In a process that is in no group: the validation, on ranks that it starts or that were measured."""
    from sas_megatron.planning import validation

    def answer(function: Any, of: RunConfig, *, world_size: int) -> list[dict[str, Any]]:
        assert (function, of) == (validation._measure_rank, config)
        assert measured is not None
        assert len(measured) == world_size
        return measured

    with pytest.MonkeyPatch.context() as patch:
        if measured is not None:
            patch.setattr(validation, "run_on_ranks", answer)
        return validation.validate_estimate(config, world_size=world_size)


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Measurements of two forked ranks."""
    with pytest.MonkeyPatch.context() as patch:
        fork_ranks(patch)
        return run_on_ranks(_measure_in_little_time, SMALL, world_size=2)


@pytest.fixture(scope="module")
def validation(separate_process: Any, measured: list[dict[str, Any]]) -> Any:
    return separate_process(_validate, SMALL, 2, measured)


def test_bytes_on_the_wire_are_equal(validation: Any) -> None:
    assert len(validation.ranks) == 2
    for rank in validation.ranks:
        assert rank.measured_bytes_sent["tensor"]
        assert rank.communication_is_equal


def test_peak_memory_is_compared_with_the_growth_of_the_process(validation: Any) -> None:
    for rank in validation.ranks:
        assert abs(rank.memory_error) < SMALL_MEMORY_ERROR, f"rank {rank.rank}: {rank.memory_error:+.1%}"
        assert rank.memory_error == pytest.approx(rank.estimated_peak_bytes / rank.measured_peak_bytes - 1)


# Beside other load what is resident is more than the tensors held, by about a tenth.
@exhaustive
def test_peak_memory_is_near_the_growth_of_the_process(separate_process: Any) -> None:
    for rank in separate_process(_validate, LARGE, 2).ranks:
        assert rank.communication_is_equal
        assert rank.measured_peak_bytes > 200 * 2**20
        assert abs(rank.memory_error) < MEMORY_ERROR, f"rank {rank.rank}: {rank.memory_error:+.1%}"


def test_time_is_estimated_from_this_machine_and_compared(
    validation: Any, measured: list[dict[str, Any]]
) -> None:
    # No bound on the error: this machine may be busy. It is what the command prints.
    slowest = max(rank["step_seconds"] for rank in measured)
    assert validation.measured_step_seconds == slowest > 0
    assert validation.step.seconds > 0
    assert validation.time_error == pytest.approx(validation.step.seconds / slowest - 1)


def test_more_ranks_than_a_machine_has_are_refused() -> None:
    with pytest.raises(UserError, match="8 at most"):
        _validate(small_config(training={"global_batch_size": 16, "micro_batch_size": 1}), 16)


def _fail_on_rank_1() -> None:
    import time

    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError(f"local rank {os.environ['LOCAL_RANK']}, {torch.get_num_threads()} threads")
    time.sleep(60)


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    with pytest.raises(RuntimeError, match="rank 1 failed") as failure:
        run_on_ranks(_fail_on_rank_1, world_size=2, threads=2)
    assert "ValueError: local rank 1, 2 threads" in str(failure.value)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("simulated")]
