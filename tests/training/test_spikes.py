"""The rule that finds spikes, applied to synthetic series."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.training.health import SMALLEST_DEVIATION, TO_STANDARD_DEVIATION, find_spike

values_near_one = st.floats(1.0, 1.1)
series = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40)
thresholds = st.floats(0.5, 20)


def test_deviations_follow_the_definition() -> None:
    # The median is 3; the absolute deviations are 2, 1, 0, 1, 2, and their median is 1.
    spike = find_spike(3 + 12 * TO_STANDARD_DEVIATION, [1, 2, 3, 4, 5], threshold=10)
    assert spike is not None
    assert spike.median == 3
    assert spike.deviations == pytest.approx(12)
    assert find_spike(3 + 9.99 * TO_STANDARD_DEVIATION, [5, 4, 3, 2, 1], threshold=10) is None


def test_the_constant_fits_the_normal_distribution() -> None:
    quantile = 1 / TO_STANDARD_DEVIATION
    assert (1 + math.erf(quantile / math.sqrt(2))) / 2 == pytest.approx(0.75, abs=1e-5)


@settings(deadline=None, derandomize=True, database=None)
@given(series, thresholds)
def test_a_value_up_to_the_median_is_not_a_spike(before: list[float], threshold: float) -> None:
    middle = sorted(before)[(len(before) - 1) // 2]
    assert find_spike(middle, before, threshold=threshold) is None
    assert find_spike(-1e9, before, threshold=threshold) is None


@settings(deadline=None, derandomize=True, database=None)
@given(series, st.floats(-1e4, 1e4), thresholds, st.integers(-8, 8))
def test_the_unit_of_the_values_does_not_matter(
    before: list[float], value: float, threshold: float, power: int
) -> None:
    scale = 2.0**power
    plain = find_spike(value, before, threshold=threshold)
    scaled = find_spike(value * scale, [earlier * scale for earlier in before], threshold=threshold)
    assert (plain is None) == (scaled is None)
    if plain is not None and scaled is not None:
        assert scaled.deviations == pytest.approx(plain.deviations)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(values_near_one, min_size=9, max_size=40), st.data())
def test_earlier_spikes_do_not_hide_a_new_one(before: list[float], data: st.DataObject) -> None:
    num_spikes = data.draw(st.integers(0, (len(before) - 1) // 2))
    mixed = [*before[num_spikes:], *[1e6] * num_spikes]
    assert find_spike(5.0, mixed, threshold=10) is not None


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(values_near_one, min_size=3, max_size=40))
def test_a_small_change_of_a_nearly_constant_series_is_not_a_spike(before: list[float]) -> None:
    # A spike would exceed the median, at least 1, by 10.1 deviations of at least 1 % of the median: 1.101.
    assert find_spike(max(before), before, threshold=10.1) is None
    assert find_spike(1.0, [0.0] * 5, threshold=10) is None
    assert find_spike(1.0 + 9.9 * SMALLEST_DEVIATION, [1.0] * 5, threshold=10) is None
    assert find_spike(1.0 + 10.1 * SMALLEST_DEVIATION, [1.0] * 5, threshold=10) is not None
