"""Optimizer steps: the micro batch size does not matter; a missing reduction makes replicas drift."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.training_runs import NUM_STEPS, find_differing_replicas, steps_without, take_steps

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
def single_process(ranks: Any) -> dict[str, Any]:
    """Return the steps of one process by attention."""
    return {attention: ranks(1).run(take_steps, config_of(attention))[0] for attention in ATTENTIONS}


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (4, 1), (1, 2)])
def test_the_micro_batch_size_does_not_change_the_losses(
    ranks: Any, single_process: Any, micro_batch_size: int, world_size: int
) -> None:
    # The samples have different numbers of tokens with a loss, so that a mean of means would differ.
    for steps in ranks(world_size).run(take_steps, config_of("mha", micro_batch_size=micro_batch_size)):
        assert steps.losses == pytest.approx(single_process["mha"].losses, rel=LOSS_AFTER_FIVE_STEPS)
        assert steps.gradient_norms == pytest.approx(single_process["mha"].gradient_norms, rel=1e-4)


def test_the_loss_starts_at_that_of_uniform_predictions_and_changes(single_process: Any) -> None:
    for steps in single_process.values():
        assert len(steps.losses) == NUM_STEPS
        assert steps.losses[0] == pytest.approx(3.87, abs=0.05)  # ln 48, the padded vocabulary
        # Without updates, the comparison of layouts would find no error.
        updated = [parameter for parameter in steps.weights.values() if (parameter.tensor != 0).any()]
        assert len(updated) == len(steps.weights)
        assert abs(steps.losses[-1] - steps.losses[0]) > 0.01


@pytest.mark.parametrize(
    ("fault", "attention", "sequence"),
    [("simulation", "sas-gather", False), ("simulation", "sas-all_to_all", True), ("layernorm", "mha", True)],
)
def test_a_missing_gradient_reduction_makes_replicas_drift(
    ranks: Any, fault: str, attention: str, sequence: bool
) -> None:
    by_rank = ranks(2).run(steps_without, fault, config_of(attention, tensor=2, sequence=sequence))
    differing = find_differing_replicas(by_rank)
    assert differing
    assert all(fault in name for name in differing)
