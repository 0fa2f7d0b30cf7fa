"""Equal time: MLP width and depth at which a step takes as long as the base's, by measuring and correcting.

A step's time is taken as a + b·layers + c·layers·width. Three measurements give the line, each further
one tries the best guess and betters the line, until the guess is within tolerance.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.matching import DEPTH, MLP, TOLERANCE, Degrees, Match, compare, counted_costs

MOST_TRIES = 5

# Runs -> by round, the seconds of a step of each.
Measure = Callable[[list[RunConfig]], list[list[float]]]


def match_time(
    base: RunConfig,
    variant: RunConfig,
    *,
    measure: Measure,
    announce: Callable[[str], None] = lambda text: None,
    free: tuple[str, ...] | None = None,
    degrees: Degrees | None = None,
    tolerance: float = TOLERANCE,
) -> Match:
    """`variant` with the MLP width, or depth and width, whose step takes as long as the base's.

    Args:
        base: the run to equal.
        variant: a run with the attention to match, near in size for a good start.
        measure: times steps of several runs in turn; ratios are taken within a round.
        announce: is told each measured ratio, since measuring takes minutes.
        free: of the MLP's width and depth; None: both, depth only where width is not enough.
        degrees: what the width must divide by; None: what the variant's own layout needs.
        tolerance: largest difference, as a share of the base's time.

    Raises:
        UserError: no guess was measured within `tolerance`; names the nearest and the noise.
    """
    for name in free or ():
        if name not in (MLP, DEPTH):
            raise FieldError("--free", name, "cannot be solved for by time", f"use {MLP} and {DEPTH}")
    degrees = degrees or Degrees.of(variant)
    degrees.check(variant)
    line = _TimeLine(base, variant, measure, announce, degrees.width_step)
    line.start(with_depth=free is None or DEPTH in free)
    for _ in range(MOST_TRIES):
        guess = line.guess(with_width=free is None or MLP in free, with_depth=free is None or DEPTH in free)
        ratio, noise = line.try_out(guess)
        if abs(ratio - 1) <= tolerance:
            config = line.config(guess)
            found = compare(counted_costs(base), config, start=variant, fields=(DEPTH, MLP))
            return replace(found, ratios={**found.ratios, "time": ratio})
    nearest, ratio = line.nearest()
    raise UserError(
        f"attention.kind={variant.attention.kind}: after {MOST_TRIES} tries nearest to the base in time is "
        f"{DEPTH}={nearest[0]}, {MLP}={nearest[1]}, {ratio - 1:+.1%} off where {tolerance:.1%} is allowed; "
        f"rounds differ by {noise:.1%}; measure more rounds on a quieter machine, free {DEPTH} and {MLP}, or "
        "take a larger base"
    )


class _TimeLine:
    """Measured step times over the base's, by (layers, MLP width), and what they say of others."""

    def __init__(
        self,
        base: RunConfig,
        variant: RunConfig,
        measure: Measure,
        announce: Callable[[str], None],
        step: int,
    ) -> None:
        self.base, self.variant, self.measure, self.step = base, variant, measure, step
        self.announce = announce
        self.ratios: dict[tuple[int, int], float] = {}
        self.layers = variant.model.num_layers
        self.width = self._rounded(variant.model.ffn_hidden_size)

    def start(self, *, with_depth: bool) -> None:
        """The variant as it is, with a narrower MLP, and with fewer layers, in one run."""
        places = [(self.layers, self.width), (self.layers, self._rounded(self.width / 2))]
        if with_depth:
            places.append((max(1, self.layers // 2), self.width))
        self._measure(list(dict.fromkeys(places)))

    def guess(self, *, with_width: bool, with_depth: bool) -> tuple[int, int]:
        """The place that should take the base's time: its own depth if some width does, the base's width
        as nearly as possible otherwise.
        """
        constant, by_layer, by_width = self._fit()
        depths = range(1, 4 * self.layers + 1) if with_depth else [self.layers]
        own_width = self.base.model.ffn_hidden_size
        guesses = []
        for layers in depths:
            width = self.width
            if with_width:
                width = self._rounded((1 - constant - by_layer * layers) / max(by_width * layers, 1e-12))
            expected = constant + by_layer * layers + by_width * layers * width
            guesses.append((abs(expected - 1), abs(width / own_width - 1), layers, width))
        close = [guess for guess in guesses if guess[0] <= TOLERANCE / 2] or guesses
        own_depth = [guess for guess in close if guess[2] == self.layers]
        best = (
            own_depth[0] if own_depth and with_width else min(close, key=lambda guess: (guess[1], guess[0]))
        )
        return best[2], best[3]

    def try_out(self, place: tuple[int, int]) -> tuple[float, float]:
        """The measured ratio of a place, and how far the rounds spread."""
        return self._measure([place])

    def nearest(self) -> tuple[tuple[int, int], float]:
        """The measured place whose time is nearest to the base's."""
        return min(self.ratios.items(), key=lambda item: abs(item[1] - 1))

    def config(self, place: tuple[int, int]) -> RunConfig:
        """The variant with so many layers, and so wide an MLP."""
        return self.variant.replaced({DEPTH: place[0], MLP: place[1]})

    def _measure(self, places: list[tuple[int, int]]) -> tuple[float, float]:
        rounds = self.measure([self.base, *(self.config(place) for place in places)])
        for index, place in enumerate(places, start=1):
            ratios = [seconds[index] / seconds[0] for seconds in rounds]
            self.ratios[place] = statistics.median(ratios)
            noise = max(ratios) - min(ratios)
            self.announce(
                f"{self.variant.attention.kind}, {DEPTH}={place[0]}, {MLP}={place[1]}: "
                f"{self.ratios[place]:.3f} of the base's time; rounds differ by {noise:.3f}"
            )
        return self.ratios[places[-1]], noise

    def _fit(self) -> tuple[float, float, float]:
        rows = [(1.0, layers, layers * width) for layers, width in self.ratios]
        if len({layers for layers, _ in self.ratios}) == 1:
            # The constant cannot be told from what each layer takes.
            rows = [(0.0, layers, product) for _, layers, product in rows]
        constant, by_layer, by_width = np.linalg.lstsq(
            np.array(rows), list(self.ratios.values()), rcond=None
        )[0]
        return float(constant), float(by_layer), float(by_width)

    def _rounded(self, width: float) -> int:
        return max(1, round(width / self.step)) * self.step
