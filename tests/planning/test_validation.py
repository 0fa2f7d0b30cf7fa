"""Estimates against real processes: wire to the byte, resident memory within a tenth."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.training.layouts import ATTENTIONS

MEMORY_ERROR = 0.1


def _validate(config: RunConfig, world_size: int) -> Any:
    from sas_megatron.planning.validation import validate_estimate

    return validate_estimate(config, world_size=world_size)


@pytest.fixture(scope="module")
def validation(simulator: Any) -> Any:
    """Two ranks of some hundred megabytes."""
    config = small_config(
        model={"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 8192},
        attention={**ATTENTIONS["sas-gather"], "num_heads": 8, "head_dim": 32},
        parallel={"tensor": 2, "sequence": True},
        data={"sequence_length": 512},
        training={"global_batch_size": 8, "micro_batch_size": 4},
        optimizer={"learning_rate": 0.01, "distributed": True},
    )
    return simulator(_validate, config, 2)


def test_bytes_on_the_wire_are_equal(validation: Any) -> None:
    assert len(validation.ranks) == 2
    for rank in validation.ranks:
        assert rank.measured_wire_bytes["tensor"]
        assert rank.wire_is_equal


# Beside other load what is resident is more than the tensors held, by about a tenth.
@pytest.mark.exhaustive
def test_peak_memory_is_near_the_growth_of_the_process(validation: Any) -> None:
    for rank in validation.ranks:
        assert rank.measured_peak_bytes > 200 * 2**20
        assert abs(rank.memory_error) < MEMORY_ERROR, f"rank {rank.rank}: {rank.memory_error:+.1%}"


def test_time_is_estimated_from_this_machine_and_compared(validation: Any) -> None:
    # No bound on the error: this machine may be busy. It is what the command prints.
    assert validation.measured_step_seconds > 0
    assert validation.step.seconds > 0
    assert validation.time_error == pytest.approx(
        validation.step.seconds / validation.measured_step_seconds - 1
    )


def test_more_ranks_than_a_machine_has_are_refused() -> None:
    with pytest.raises(UserError, match="8 at most"):
        _validate(small_config(training={"global_batch_size": 16, "micro_batch_size": 1}), 16)


def _fail_on_rank_1() -> None:
    import time

    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("as asked")
    time.sleep(600)


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    from sas_megatron.planning.rank_processes import run_on_ranks

    with pytest.raises(RuntimeError, match="rank 1 failed") as failure:
        run_on_ranks(_fail_on_rank_1, world_size=2)
    assert "as asked" in str(failure.value)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("simulated")]
