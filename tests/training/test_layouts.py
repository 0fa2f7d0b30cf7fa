"""Every layout computes what one process does: initial weights, every gradient, and five steps' losses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.model.model_parts import joined_weights
from tests.tolerances import LOSS_AFTER_FIVE_STEPS, WHOLE_MODEL_GRADIENT, assert_within
from tests.training.layouts import ATTENTIONS, LAYOUTS, Layout
from tests.training.training_runs import Steps, take_steps, tensor_groups


@pytest.fixture(scope="module")
def alone(ranks: Any) -> Any:
    """`alone(layout, attention)`: the steps of one process, each taken once."""

    @functools.cache
    def steps(model: tuple[tuple[str, Any], ...], attention: str) -> Steps:
        return ranks(1).run(take_steps, Layout(1, model=dict(model)).config(attention))[0]

    return lambda layout, attention: steps(tuple(layout.model.items()), attention)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every layout with one attention in turn, or, with --all, with each.

    The layout varies slowest, since ranks keep their groups from test to test.
    """
    if "attention" not in metafunc.fixturenames:
        return
    attentions = list(ATTENTIONS)
    whole = metafunc.config.getoption("--all")
    cases = [
        (name, attention)
        for index, name in enumerate(LAYOUTS)
        for attention in (
            attentions if whole else [attentions[(index + index // len(attentions)) % len(attentions)]]
        )
    ]
    metafunc.parametrize(("name", "attention"), cases)


@pytest.mark.sampled(every=3)
def test_every_layout_trains_as_one_process_does(ranks: Any, alone: Any, name: str, attention: str) -> None:
    layout = LAYOUTS[name]
    expected: Steps = alone(layout, attention)
    by_rank: list[Steps] = ranks(layout.world_size).run(take_steps, layout.config(attention))
    seen: set[str] = set()
    for group in tensor_groups(by_rank):
        weights = joined_weights([steps.initial_weights for steps in group])
        gradients = joined_weights([steps.gradients for steps in group])
        seen |= weights.keys()
        assert gradients.keys() == weights.keys()
        for parameter, weight in weights.items():
            whole = expected.initial_weights[parameter].tensor
            assert torch.equal(weight, whole), f"{parameter} starts otherwise"
            gradient = expected.gradients[parameter].tensor
            assert_within(WHOLE_MODEL_GRADIENT, gradients[parameter], gradient, f"gradient of {parameter}")
    assert seen == expected.initial_weights.keys()
    for steps in by_rank:
        assert steps.losses == pytest.approx(expected.losses, rel=LOSS_AFTER_FIVE_STEPS)
        assert steps.gradient_norms[0] == pytest.approx(expected.gradient_norms[0], rel=1e-5)
