from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.hold_out import predict_largest
from tests.scaling.synthetic import CHINCHILLA, draw_grid
from tests.selection import draws

# Of intervals of 95 %, by the number of surfaces: all but once in a thousand.
SHARES_INSIDE = {30: (0.83, 1.0), 60: (0.88, 0.995)}


@draws(30, 60)
def test_the_largest_runs_are_predicted_within_their_intervals_as_often_as_they_say(num_draws: int) -> None:
    inside, errors = 0, []
    for seed in range(num_draws):
        held = predict_largest(draw_grid(seed), share=0.04, num_draws=100, seed=seed)
        # Of 60 points the three seeds of the largest run.
        assert (len(held.runs), held.num_fitted) == (3, 57)
        assert held.reach == pytest.approx((160 / 5) ** (1 / 3), rel=1e-6)
        inside += round(held.share_inside * len(held.runs))
        for run in held.runs:
            low, high = np.log(run.interval)
            errors.append((np.log(run.loss) - (low + high) / 2) / ((high - low) / 2 / stats.norm.ppf(0.975)))
    # The three runs of a surface share its error, so they count for about two.
    fewest, most = SHARES_INSIDE[num_draws]
    assert fewest <= inside / len(errors) <= most
    # Few runs do not show by their number that intervals are too wide; the size of their errors does.
    independent = 2 * num_draws
    smallest, largest = stats.chi2.interval(0.999, independent)
    assert smallest / independent <= np.mean(np.square(errors)) <= largest / independent


def test_what_is_held_out_has_no_part_in_the_fit() -> None:
    points = draw_grid(0, noise=0)
    broken = np.where(points.compute > 0.9 * points.compute.max(), 2 * points.loss, points.loss)
    held = predict_largest(
        type(points)(points.params, points.tokens, broken, points.flops, points.sizes),
        share=0.04,
        num_draws=40,
        seed=0,
    )
    for run in held.runs:
        expected = float(CHINCHILLA.predict(np.array(run.params), np.array(run.tokens)))
        assert run.predicted == pytest.approx(expected, rel=1e-6)
        assert run.relative_error == pytest.approx(-0.5, rel=1e-5)
    assert held.share_inside == 0
    assert held.root_mean_square_error == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(FieldError, match="--hold-out"):
        predict_largest(draw_grid(0), share=share, num_draws=40, seed=0)


def test_when_the_rest_cannot_tell_a_law_it_is_said() -> None:
    with pytest.raises(FieldError, match="needs at least 6 points"):
        predict_largest(draw_grid(0, sizes=3, budgets=3, seeds=1), share=0.5, num_draws=40, seed=0)
