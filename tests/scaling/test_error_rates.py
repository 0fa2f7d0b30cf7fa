"""Coverage of intervals, family-wise errors and power, for studies with the structure of the shipped one.

Five sizes, three budgets and three seeds that all sizes and budgets share, three variants with one seed, and
noise that falls with the budget, as measured in docs/studies/python. The share of its variance that the runs
of a seed have in common is not known, so that several are simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from sas_megatron.scaling.outcomes import Outcome
from sas_megatron.scaling.verdicts import Verdict, judge_variants
from tests.selection import exhaustive

SEEDS = {"mha": 3, "gqa": 1, "mla": 1, "tpa": 1, "sas": 3}
DEVIATIONS = {"2": 0.075, "4": 0.050, "8": 0.038}
CANDIDATES = list(SEEDS)[1:]
# The deviation of a run, pooled over budgets.
POOLED = math.sqrt(sum(deviation**2 for deviation in DEVIATIONS.values()) / len(DEVIATIONS))


@dataclass(frozen=True)
class Shares:
    """Shares of the variance: of a seed and variant at all sizes, of a trunk, and of a run.

    `order` is that of a seed for all variants.
    """

    seed: float
    trunk: float
    run: float
    order: float = 0.0


INDEPENDENT = Shares(0.0, 0.0, 1.0)
TRUNKS = Shares(0.0, 0.7, 0.3)
CLUSTERS = Shares(0.3, 0.4, 0.3)
ORDERED = Shares(0.0, 0.4, 0.2, order=0.4)


def draw_study(generator: np.random.Generator, shares: Shares, effect: float = 0.0) -> list[Outcome]:
    """Draw the runs of a study in which all candidates differ from the baseline by `effect`."""
    order = generator.standard_normal(max(SEEDS.values()))
    outcomes = []
    for variant, count in SEEDS.items():
        of_seed = generator.standard_normal(count)
        for size in range(5):
            of_trunk = generator.standard_normal(count)
            params = 1e5 * 1.4**size
            for budget, deviation in DEVIATIONS.items():
                of_run = generator.standard_normal(count)
                errors = (
                    math.sqrt(shares.order) * order[:count]
                    + math.sqrt(shares.seed) * of_seed
                    + math.sqrt(shares.trunk) * of_trunk
                    + math.sqrt(shares.run) * of_run
                )
                tokens = params * float(budget)
                law = 1.8 + 260 / params**0.42 + 300 / tokens**0.5 + effect * (variant != "mha")
                flops = 6 * params * tokens * (1.5 if variant == "sas" else 1.0)
                outcomes += [
                    Outcome(
                        variant=variant,
                        size=f"w{size}",
                        budget=budget,
                        seed=seed,
                        params=int(params),
                        tokens=int(tokens),
                        flops=flops,
                        causal_flops=flops,
                        seconds=None,
                        loss=float(law + deviation * error),
                    )
                    for seed, error in enumerate(errors)
                ]
    return outcomes


def judge(generator: np.random.Generator, shares: Shares, effect: float = 0.0) -> tuple[Verdict, ...]:
    outcomes = draw_study(generator, shares, effect)
    return judge_variants(outcomes, baseline="mha", candidates=CANDIDATES, axis="tokens")


def covers(verdict: Verdict, difference: float) -> bool:
    assert verdict.estimate is not None
    assert verdict.estimate.interval is not None
    low, high = verdict.estimate.interval
    return low <= difference <= high


def check_error_rates(shares: Shares, draws: int) -> None:
    generator = np.random.default_rng(11)
    inside, wrong = dict.fromkeys(CANDIDATES, 0), 0
    for _ in range(draws):
        verdicts = judge(generator, shares)
        for verdict in verdicts:
            inside[verdict.candidate] += covers(verdict, 0.0)
        wrong += any(verdict.result != "inconclusive" for verdict in verdicts)
    error = 2 * math.sqrt(0.05 * 0.95 / draws)
    assert wrong / draws <= 0.05 + error
    of_one_seed = np.mean([inside[name] for name in ("gqa", "mla", "tpa")]) / draws
    for coverage in (inside["sas"] / draws, of_one_seed):
        assert 0.93 - error <= coverage <= 0.97 + error


def test_intervals_have_their_nominal_coverage_and_variants_win_by_chance_in_5_percent() -> None:
    check_error_rates(CLUSTERS, 150)


@exhaustive
@pytest.mark.parametrize("shares", [INDEPENDENT, TRUNKS, CLUSTERS])
def test_error_rates_in_1000_studies(shares: Shares) -> None:
    check_error_rates(shares, 1000)


@exhaustive
def test_intervals_of_single_seeds_are_wide_if_all_variants_share_the_effect_of_a_seed() -> None:
    # The seeds of the baseline do not tell which part of a seed's effect the variant shares.
    generator = np.random.default_rng(12)
    studies = [judge(generator, ORDERED) for _ in range(1000)]
    coverage = {
        name: np.mean([covers(verdicts[index], 0.0) for verdicts in studies])
        for index, name in enumerate(CANDIDATES)
    }
    assert 0.93 <= coverage["sas"] <= 0.97
    assert all(0.95 <= coverage[name] <= 0.995 for name in ("gqa", "mla", "tpa"))


@exhaustive
@pytest.mark.parametrize(
    ("shares", "one_seed", "three_seeds"),
    [(INDEPENDENT, 0.87, 0.87), (TRUNKS, 0.59, 0.60), (CLUSTERS, 0.30, 0.34)],
)
def test_power_against_two_pooled_deviations(shares: Shares, one_seed: float, three_seeds: float) -> None:
    # As docs/studies.md states.
    generator = np.random.default_rng(13)
    studies = [judge(generator, shares, -2 * POOLED) for _ in range(500)]
    wins = {
        name: np.mean([verdicts[index].result == "wins" for verdicts in studies])
        for index, name in enumerate(CANDIDATES)
    }
    assert np.mean([wins[name] for name in ("gqa", "mla", "tpa")]) == pytest.approx(one_seed, abs=0.05)
    assert wins["sas"] == pytest.approx(three_seeds, abs=0.05)
