"""Optimizer steps: the cut into microbatches, and that a missing gradient sum is noticed."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.training_runs import NUM_STEPS, replicas_that_differ, steps_without, take_steps

ATTENTIONS: dict[str, dict[str, Any]] = {
    "mha": {"kind": "mha", "num_heads": 4, "head_dim": 6},
    "sas-gather": {"kind": "sas", "num_heads": 4, "head_dim": 6, "head_expansion": 2, "exchange": "gather"},
    "sas-all_to_all": {
        "kind": "sas",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "exchange": "all_to_all",
    },
}


def config_of(
    attention: str,
    *,
    tensor: int = 1,
    sequence: bool = False,
    micro_batch_size: int = 2,
) -> RunConfig:
    return small_config(
        attention=ATTENTIONS[attention],
        parallel={"tensor": tensor, "sequence": sequence},
        optimizer={"learning_rate": 0.01},
        schedule={"warmup_steps": 2},
        training={"num_steps": 9, "global_batch_size": 4, "micro_batch_size": micro_batch_size},
    )


@pytest.fixture(scope="module")
def alone(ranks: Any) -> dict[str, Any]:
    """The steps of one process."""
    return {attention: ranks(1).run(take_steps, config_of(attention))[0] for attention in ATTENTIONS}


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (4, 1), (1, 2)])
def test_the_cut_into_microbatches_changes_nothing(
    ranks: Any, alone: Any, micro_batch_size: int, world_size: int
) -> None:
    # Samples bear loss on unequal numbers of tokens, so a mean of means would differ.
    for steps in ranks(world_size).run(take_steps, config_of("mha", micro_batch_size=micro_batch_size)):
        assert steps.losses == pytest.approx(alone["mha"].losses, rel=LOSS_AFTER_FIVE_STEPS)
        assert steps.gradient_norms == pytest.approx(alone["mha"].gradient_norms, rel=1e-4)


def test_the_loss_starts_at_that_of_a_guess_and_moves(alone: Any) -> None:
    for steps in alone.values():
        assert len(steps.losses) == NUM_STEPS
        assert steps.losses[0] == pytest.approx(3.87, abs=0.05)  # ln 48, the padded vocabulary
        # Were the weights not updated, a wrong layout would go unnoticed.
        moved = [parameter for parameter in steps.weights.values() if (parameter.tensor != 0).any()]
        assert len(moved) == len(steps.weights)
        assert abs(steps.losses[-1] - steps.losses[0]) > 0.01


@pytest.mark.parametrize(
    ("fault", "attention", "sequence"),
    [("simulation", "sas-gather", False), ("simulation", "sas-all_to_all", True), ("layernorm", "mha", True)],
)
def test_a_gradient_sum_left_out_makes_replicas_drift(
    ranks: Any, fault: str, attention: str, sequence: bool
) -> None:
    by_rank = ranks(2).run(steps_without, fault, config_of(attention, tensor=2, sequence=sequence))
    differing = replicas_that_differ(by_rank)
    assert differing
    assert all(fault in name for name in differing)
