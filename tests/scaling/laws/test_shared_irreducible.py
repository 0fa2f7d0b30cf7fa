"""The test of a shared irreducible loss: level, power and message."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.shared_irreducible import compare_irreducible
from tests.scaling.synthetic import CHINCHILLA, draw_grid
from tests.selection import draws

OTHER_TERMS = dataclasses.replace(CHINCHILLA, A=380.0, B=430.0, alpha=0.335, beta=0.285)


@draws(30, 100)
def test_shared_irreducible_loss_is_rejected_at_the_nominal_level(num_draws: int) -> None:
    tests = [
        compare_irreducible(
            {
                "a": draw_grid(2 * seed, sizes=4, budgets=3, seeds=1),
                "b": draw_grid(2 * seed + 1, sizes=4, budgets=3, seeds=1, truth=OTHER_TERMS),
            }
        )
        # With 24 points, the asymptotic χ² would reject far more often.
        for seed in range(num_draws)
    ]
    rejected = sum(test.differs for test in tests)
    low, high = stats.binom.interval(0.999, num_draws, 0.05)
    assert low <= rejected <= high
    for test in tests:
        ratio = np.exp(test.statistic / 24)
        assert test.p_value == pytest.approx(stats.f.sf((ratio - 1) * 14, 1, 14))
    # The p-values are uniform, not only in their tail.
    assert stats.kstest([test.p_value for test in tests], "uniform").pvalue > 0.001
    assert "irreducible losses do not differ significantly" in next(t for t in tests if not t.differs).text


def test_difference_is_detected_and_phrased() -> None:
    higher = dataclasses.replace(CHINCHILLA, E=1.85)
    test = compare_irreducible({"mha": draw_grid(1), "sas": draw_grid(2, truth=higher)})
    assert test.differs
    assert test.text.startswith("The irreducible losses differ (mha 1.")
    assert test.degrees == (1, 110)
    assert test.separate["sas"] == pytest.approx(1.85, abs=0.1)


def test_equal_laws_have_the_shared_value() -> None:
    points = draw_grid(4, noise=0)
    test = compare_irreducible({"a": points, "b": points})
    assert test.shared == pytest.approx(1.69, rel=1e-6)
    doubled = compare_irreducible({"a": draw_grid(4), "b": draw_grid(4)})
    assert doubled.statistic == pytest.approx(0, abs=1e-9)
    assert doubled.p_value == pytest.approx(1)


def test_single_variant_is_refused() -> None:
    with pytest.raises(FieldError, match="at least two"):
        compare_irreducible({"a": draw_grid(0)})
    with pytest.raises(FieldError, match="needs at least 6 points"):
        compare_irreducible({"a": draw_grid(0), "b": draw_grid(0).take(np.arange(5))})
