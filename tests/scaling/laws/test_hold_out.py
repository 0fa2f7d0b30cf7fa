"""Prediction of held-out runs: coverage and width of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.hold_out import predict_largest
from tests.scaling.synthetic import CHINCHILLA, draw_grid
from tests.selection import draws

# Bounds of the coverage of 95 % intervals by the number of surfaces, at a probability of 99.9 %.
SHARES_INSIDE = {30: (0.83, 1.0), 60: (0.88, 0.995)}


@draws(30, 60)
def test_prediction_intervals_have_their_nominal_coverage(num_draws: int) -> None:
    inside, errors = 0, []
    for seed in range(num_draws):
        held = predict_largest(draw_grid(seed), share=0.04, num_draws=100, seed=seed)
        # Of 60 points, the three seeds of the largest run are held out.
        assert (len(held.runs), held.num_fitted) == (3, 57)
        assert held.reach == pytest.approx((160 / 5) ** (1 / 3), rel=1e-6)
        inside += held.num_inside
        for run in held.runs:
            low, high = np.log(run.noise95)
            errors.append((np.log(run.loss) - (low + high) / 2) / ((high - low) / 2 / stats.norm.ppf(0.975)))
    # The three runs of a surface share its error, so that they count as about two.
    fewest, most = SHARES_INSIDE[num_draws]
    assert fewest <= inside / len(errors) <= most
    # The coverage of few runs cannot show that intervals are too wide; the size of the errors can.
    independent = 2 * num_draws
    smallest, largest = stats.chi2.interval(0.999, independent)
    assert smallest / independent <= np.mean(np.square(errors)) <= largest / independent


def test_held_out_runs_do_not_affect_the_fit() -> None:
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
def test_invalid_share_is_refused(share: float) -> None:
    with pytest.raises(FieldError, match="--hold-out"):
        predict_largest(draw_grid(0), share=share, num_draws=40, seed=0)


def test_too_few_remaining_points_are_refused() -> None:
    with pytest.raises(FieldError, match="needs at least 6 points"):
        predict_largest(draw_grid(0, sizes=3, budgets=3, seeds=1), share=0.5, num_draws=40, seed=0)
