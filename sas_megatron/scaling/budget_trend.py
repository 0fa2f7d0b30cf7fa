"""Change of a difference with the budget: does a candidate gain on the baseline as both spend more?

cells of a verdict -> line through the differences over the logarithm of the amount, weighted as in the mean
                   -> its slope, with the error from the seeds (`seed_noise`)
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from sas_megatron.scaling.seed_noise import NoiseModel
from sas_megatron.scaling.significance import Estimate
from sas_megatron.scaling.verdicts import Verdict

# Amounts within this ratio do not show a change.
SMALLEST_RATIO = 1.5


def estimate_trend(verdict: Verdict, noise: NoiseModel) -> Estimate | None:
    """Return the change of the difference per tenfold amount; None if the cells have almost one amount.

    It is a weighted sum of the cells' losses, so that its error follows from the same noise as that of the
    mean. Negative means that the candidate gains.

    Args:
        verdict: A comparison on an axis.
        noise: The noise of the runs.
    """
    amounts = np.array([cell.amount for cell in verdict.cells])
    if len(amounts) < 2 or amounts.max() / amounts.min() < SMALLEST_RATIO:
        return None
    x = np.log10(amounts)
    shares = noise.weigh([cell.weights for cell in verdict.cells])
    x_centred = x - shares @ x
    factors = shares * x_centred / (shares @ x_centred**2)
    combined: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] = (Counter(), Counter())
    for factor, cell in zip(factors.tolist(), verdict.cells, strict=True):
        for total, weights in zip(combined, cell.weights, strict=True):
            for name, weight in weights.items():
                total[name] += factor * weight
    slope = float(factors @ np.array([cell.difference for cell in verdict.cells]))
    return noise.estimate(slope, candidate=verdict.candidate, baseline=verdict.baseline, weights=combined)
