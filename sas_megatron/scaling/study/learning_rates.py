"""Peak learning rates of a study, by a published rule or by a sweep, and weight decay by a rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sas_megatron.config.errors import UserError


def kaplan_rate(parameters: int) -> float:
    """Return 0.003239 − 0.0001395 ln N (Kaplan et al. 2020, eq. D.1), N without embeddings.

    Raises:
        UserError: The rate is not positive, since there are too many parameters.
    """
    rate = 0.003239 - 0.0001395 * math.log(parameters)
    if rate <= 0:
        raise UserError(
            f"learning_rate.rule=kaplan: gives {rate:.2g} for {parameters:,} parameters; use step_law"
        )
    return rate


def step_law_rate(parameters: int, tokens: float) -> float:
    """Return 1.79 N^−0.713 D^0.307 (Li et al. 2025, eq. 1), N without embeddings."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def step_law_batch_tokens(tokens: float) -> float:
    """Return 0.58 D^0.571, the tokens per step (Li et al. 2025, eq. 1)."""
    return float(0.58 * tokens**0.571)


def timescale_weight_decay(learning_rate: float, steps: int, *, tokens_per_parameter: float) -> float:
    """Return 1 / (learning rate × steps × τ) with τ = 1.084 (D/N)^−0.527 (Bergsma et al. 2025)."""
    return float(1 / (learning_rate * steps * 1.084 * tokens_per_parameter**-0.527))


@dataclass(frozen=True)
class Trial:
    """A run of a sweep; `loss` is None if it diverged."""

    learning_rate: float
    loss: float | None


@dataclass(frozen=True)
class BestRate:
    """The best learning rate of a sweep; `at_edge` if it is the lowest or highest rate of the sweep."""

    learning_rate: float
    at_edge: bool


def find_best_rate(trials: Sequence[Trial]) -> BestRate:
    """Return the minimum of the parabola through the best trial and its neighbours, over the log of the rate.

    If the best trial has no neighbour on a side, or that neighbour diverged, its own rate is returned.

    Raises:
        UserError: All trials diverged.
    """
    ordered = sorted(trials, key=lambda trial: trial.learning_rate)
    losses = [math.inf if trial.loss is None else trial.loss for trial in ordered]
    best = min(range(len(ordered)), key=losses.__getitem__)
    if math.isinf(losses[best]):
        rates = ", ".join(f"{trial.learning_rate:.3g}" for trial in ordered)
        raise UserError(f"learning_rate.factors: every run of a sweep diverged ({rates}); try lower rates")
    rate = ordered[best].learning_rate
    if best in (0, len(ordered) - 1):
        return BestRate(rate, at_edge=True)
    if math.isinf(losses[best - 1]) or math.isinf(losses[best + 1]):
        return BestRate(rate, at_edge=False)
    x = [math.log(trial.learning_rate) for trial in ordered[best - 1 : best + 2]]
    y = losses[best - 1 : best + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    # The slopes satisfy left ≤ 0 ≤ right; if all three losses are equal, the middle rate is returned.
    if right - left <= 0:
        return BestRate(rate, at_edge=False)
    middles = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    minimum = middles[0] - left * (middles[1] - middles[0]) / (right - left)
    return BestRate(math.exp(minimum), at_edge=False)


def compare_with_law(best: Mapping[str, float], law: Mapping[str, float]) -> dict[str, float]:
    """Return the best rate of each swept size divided by the rate of a law."""
    return {size: rate / law[size] for size, rate in best.items()}


def extend_rates(best: Mapping[str, float], law: Mapping[str, float]) -> dict[str, float]:
    """Return the rates of a law times the geometric mean of best rate / law over the swept sizes.

    Sweeps at two sizes determine a level but no exponent: a power of N fitted to two such close sizes, with
    one seed each, is mostly noise, and would give two variants different rates at the largest size by chance.

    Args:
        best: Best rates of the swept sizes, by name.
        law: Rates of all sizes, by name.
    """
    multiple = statistics.geometric_mean(compare_with_law(best, law).values())
    return {size: multiple * rate for size, rate in law.items()}
