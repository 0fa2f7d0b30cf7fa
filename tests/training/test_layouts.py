"""Every layout gives the results of one process: initial weights, every gradient, five losses, probes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import joined_weights
from tests.selection import exhaustive
from tests.tolerances import (
    LAYER_MEASUREMENT,
    LOSS_AFTER_FIVE_STEPS,
    WHOLE_MODEL_GRADIENT,
    assert_within,
)
from tests.training.layouts import ATTENTIONS, DEFAULT_PAIRS, LAYOUTS
from tests.training.training_runs import Steps, take_steps, tensor_groups


@pytest.fixture(scope="module")
def run_single_process(ranks: Any) -> Any:
    """Return a cached function from a config to the steps of one process."""

    @functools.cache
    def steps(config: str) -> Steps:
        return ranks(1).run(take_steps, RunConfig.model_validate_json(config))[0]

    return lambda config: steps(config.model_dump_json())


# The layout varies slowest, because ranks reuse their process groups between tests.
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(*pair, marks=() if pair in DEFAULT_PAIRS else exhaustive)
        for pair in itertools.product(LAYOUTS, ATTENTIONS)
    ],
)
def test_every_layout_trains_like_one_process(
    ranks: Any, run_single_process: Any, name: str, attention: str
) -> None:
    layout = LAYOUTS[name]
    expected: Steps = run_single_process(layout.single_process(attention))
    by_rank: list[Steps] = ranks(layout.world_size).run(take_steps, layout.config(attention))
    seen: set[str] = set()
    for group in tensor_groups(by_rank):
        weights = joined_weights([steps.initial_weights for steps in group])
        gradients = joined_weights([steps.gradients for steps in group])
        seen |= weights.keys()
        assert gradients.keys() == weights.keys()
        for parameter, weight in weights.items():
            expected_weight = expected.initial_weights[parameter].tensor
            assert torch.equal(weight, expected_weight), f"{parameter} has other initial weights"
            gradient = expected.gradients[parameter].tensor
            assert_within(WHOLE_MODEL_GRADIENT, gradients[parameter], gradient, f"gradient of {parameter}")
    assert seen == expected.initial_weights.keys()
    for steps in by_rank:
        assert steps.losses == pytest.approx(expected.losses, rel=LOSS_AFTER_FIVE_STEPS)
        assert steps.gradient_norms[0] == pytest.approx(expected.gradient_norms[0], rel=1e-5)
        for found, of_one_process in ((steps.probe, expected.probe), (steps.update, expected.update)):
            assert_equal_layers(found, of_one_process)


def assert_equal_layers(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare what was measured in each layer."""
    assert [layer["layer"] for layer in found] == list(range(1, len(expected) + 1))
    for layer, of_one_process in zip(found, expected, strict=True):
        assert layer.keys() == of_one_process.keys()
        for name, values in of_one_process.items():
            # A largest score may be near 0.
            nearly = pytest.approx(values, rel=LAYER_MEASUREMENT, abs=LAYER_MEASUREMENT / 100)
            assert layer[name] == nearly, name


def test_the_default_pairs_are_in_the_table_and_include_every_attention() -> None:
    assert set(itertools.product(LAYOUTS, ATTENTIONS)) >= DEFAULT_PAIRS
    assert {attention for _, attention in DEFAULT_PAIRS} == set(ATTENTIONS)
