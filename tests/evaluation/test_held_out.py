"""The loss on validation windows, also if a run has diverged."""

from __future__ import annotations

import json
import math

import pytest

from sas_megatron.evaluation.held_out import HeldOutLoss


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_none_in_records(loss: float) -> None:
    results = HeldOutLoss(loss, num_tokens=5, num_bytes=11).results
    assert set(results.values()) == {None}
    json.dumps(results, allow_nan=False)


def test_a_loss_is_recorded_even_if_its_perplexity_is_infinite() -> None:
    results = HeldOutLoss(1e4, num_tokens=5, num_bytes=11).results
    assert results["validation_loss"] == 1e4
    assert results["validation_perplexity"] is None
    assert results["validation_bits_per_byte"] == pytest.approx(1e4 * 5 / 11 / math.log(2))
