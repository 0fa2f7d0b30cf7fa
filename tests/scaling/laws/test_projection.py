"""Variable projection: its non-negative least squares agree with SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from sas_megatron.scaling.laws.projection import project


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]))
def test_coefficients_agree_with_scipy_nnls(seed: int, num_terms: int) -> None:
    generator = np.random.default_rng(seed)
    # Around zero, so that some unconstrained coefficients are negative.
    terms = generator.standard_normal((2, 11, num_terms)) + 0.3
    weights = generator.uniform(0, 2, (3, 11))
    found = project(terms, weights)
    for row, weight in enumerate(np.sqrt(weights)):
        for grid in range(2):
            expected, norm = optimize.nnls(terms[grid] * weight[:, None], weight)
            np.testing.assert_allclose(found.coefficients[row, grid], expected, atol=1e-9)
            assert found.squares[row, grid] == pytest.approx(norm**2, abs=1e-9)


def test_equal_terms_share_a_coefficient() -> None:
    terms = np.ones((1, 7, 2))
    found = project(terms, np.ones((1, 7)))
    assert found.coefficients.sum() == pytest.approx(1)
    assert found.squares[0, 0] == pytest.approx(0, abs=1e-9)
