"""The change of a difference with the budget, against slopes that are fitted to each seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.budget_trend import estimate_trend
from sas_megatron.scaling.outcomes import Outcome
from sas_megatron.scaling.verdicts import judge_variants, model_noise

BUDGETS = (1e12, 4e12, 16e12)
SEEDS = 5


def draw(budgets: tuple[float, ...] = BUDGETS, *, slope: float = -0.04, noise: float = 0.01) -> list[Outcome]:
    """Draw runs of one size whose difference changes by `slope` per tenfold budget."""
    generator = np.random.default_rng(3)
    runs = []
    for seed in range(SEEDS):
        # A seed has the same effect on both variants and all budgets.
        effect = generator.normal(0, 0.05)
        for variant, gap in (("mha", 0.0), ("sas", 1.0)):
            for flops in budgets:
                difference = gap * (0.1 + slope * math.log10(flops / BUDGETS[0]))
                loss = 3.0 + (1e12 / flops) ** 0.1 + difference + effect + generator.normal(0, noise)
                runs.append(
                    Outcome(variant, "w", f"{flops:g}", seed, 100, int(flops / 1e6), flops, flops, None, loss)
                )
    return runs


def test_trend_is_the_mean_of_the_slopes_of_the_seeds_with_their_t_test() -> None:
    runs = draw()
    noise = model_noise(runs)
    (verdict,) = judge_variants(runs, baseline="mha", candidates=["sas"], axis="flops", noise=noise)
    found = estimate_trend(verdict, noise)
    losses = {(run.variant, run.budget, run.seed): run.known("loss") for run in runs}
    x = np.log10(BUDGETS)
    shares = noise.weigh([cell.weights for cell in verdict.cells])
    slopes = [
        np.polyfit(
            x,
            [losses["sas", f"{flops:g}", seed] - losses["mha", f"{flops:g}", seed] for flops in BUDGETS],
            deg=1,
            w=np.sqrt(shares),
        )[0]
        for seed in range(SEEDS)
    ]
    test = stats.ttest_1samp(slopes, 0.0)
    interval = test.confidence_interval(0.95)
    assert found is not None
    assert found.difference == pytest.approx(np.mean(slopes))
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.degrees == pytest.approx(SEEDS - 1)
    assert found.interval[0] < -0.04 < found.interval[1]


def test_one_budget_shows_no_trend() -> None:
    runs = draw(BUDGETS[:1])
    noise = model_noise(runs)
    (verdict,) = judge_variants(runs, baseline="mha", candidates=["sas"], axis="flops", noise=noise)
    assert verdict.estimate is not None
    assert estimate_trend(verdict, noise) is None
