"""Synthetic studies: points and outcomes drawn from a loss surface, with noise in the log loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sas_megatron.scaling.laws.loss_surface import LossSurface
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.outcomes import Outcome

# The rounded estimates of Hoffmann et al. 2022, section 3.3.
CHINCHILLA = LossSurface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def draw_grid(
    seed: int,
    *,
    sizes: int = 5,
    budgets: int = 4,
    seeds: int = 3,
    noise: float = 0.004,
    truth: LossSurface = CHINCHILLA,
) -> Points:
    """Draw every size at budgets of 5 to 160 tokens per parameter, with several seeds."""
    params = np.repeat(np.geomspace(2e7, 5e9, sizes), budgets * seeds)
    tokens = params * np.tile(np.repeat(np.geomspace(5, 160, budgets), seeds), sizes)
    normal = np.random.default_rng(seed).standard_normal(len(params))
    loss = truth.predict(params, tokens) * np.exp(noise * normal)
    return Points.of(params, tokens, loss, flops=6 * params * tokens)


def draw_isoflops(
    seed: int, *, count: int = 240, noise: float = 0.01, outliers: int = 5, truth: LossSurface = CHINCHILLA
) -> Points:
    """Draw runs around eight budgets, as in the Chinchilla paper, with some outliers of high loss."""
    generator = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(6e18, 3e21, 8), count // 8)
    params = np.sqrt(flops / 120) * np.exp(generator.uniform(-1.6, 1.6, count))
    tokens = flops / 6 / params
    loss = truth.predict(params, tokens) * np.exp(noise * generator.standard_normal(count))
    loss[generator.choice(count, outliers, replace=False)] *= np.exp(generator.uniform(0.05, 0.3, outliers))
    return Points.of(params, tokens, loss, flops=flops)


@dataclass(frozen=True)
class Variant:
    """Loss surface of a variant, and factors on 6N FLOPs per token and on the time at 1e15 FLOP/s.

    `causal_share` is the share of the FLOPs with the causal half of the attention.
    """

    surface: LossSurface = CHINCHILLA
    flops_factor: float = 1.0
    seconds_factor: float = 1.0
    causal_share: float = 0.9


def draw_outcomes(
    variants: Mapping[str, Variant],
    *,
    seed: int = 0,
    sizes: int = 3,
    budgets: int = 4,
    seeds: int = 3,
    noise: float = 0.003,
    shared_noise: float = 0.0,
    trunk_noise: float = 0.0,
) -> list[Outcome]:
    """Draw the runs of all sizes, budgets and seeds of each variant.

    `shared_noise` is the standard deviation of the error that all variants share for a seed; `trunk_noise` is
    that of the error that all budgets of a variant and size share.
    """
    generator = np.random.default_rng(seed)
    of_trunks = trunk_noise * np.random.default_rng([seed, 1]).standard_normal((sizes, seeds, len(variants)))
    outcomes = []
    for number, params in enumerate(np.geomspace(3e7, 1e9, sizes)):
        for ratio in np.geomspace(5, 135, budgets):
            for run_seed in range(seeds):
                tokens = params * ratio
                common = shared_noise * generator.standard_normal()
                for index, (name, variant) in enumerate(variants.items()):
                    error = float(of_trunks[number, run_seed, index] + noise * generator.standard_normal())
                    loss = variant.surface.predict(np.array(params), np.array(tokens))
                    flops = 6 * params * tokens * variant.flops_factor
                    outcomes.append(
                        Outcome(
                            variant=name,
                            size=f"s{number}",
                            budget=f"{ratio:.0f}",
                            seed=run_seed,
                            params=int(params),
                            tokens=int(tokens),
                            flops=flops,
                            causal_flops=flops * variant.causal_share,
                            seconds=flops / 1e15 * variant.seconds_factor,
                            loss=float(loss * np.exp(common + error)),
                        )
                    )
    return outcomes
