"""Matching in time: MLP width and depth at which a training step takes as long as the base's.

The step time is modelled as a + b·layers + c·layers·width. Three measurements determine the model. Each
further measurement tests the shape that the model predicts and refines the model, until a shape is within the
tolerance.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.matching import DEPTH, MLP, TOLERANCE, Degrees, Match, build_match, counted_costs

MAX_TRIES = 5

# Configs -> for each round, the seconds per step of each config.
RoundTimer = Callable[[list[RunConfig]], list[list[float]]]


def match_time(
    base: RunConfig,
    variant: RunConfig,
    *,
    measure: RoundTimer,
    log: Callable[[str], None] = lambda text: None,
    free: tuple[str, ...] | None = None,
    degrees: Degrees | None = None,
    tolerance: float = TOLERANCE,
) -> Match:
    """Return `variant` with the MLP width, or depth and width, at which its step time equals the base's.

    Args:
        base: The reference run.
        variant: A run with the attention to match, of similar size.
        measure: Measures steps of several runs in alternation; ratios are computed within a round.
        log: Called with each measured ratio, since measuring takes minutes.
        free: MLP width, depth or both. None: both, but the depth changes only if the width is not enough.
        degrees: Parallel sizes that the width must support; None: the sizes of the variant's layout.
        tolerance: Largest difference, relative to the base's time.

    Raises:
        FieldError: A field in `free` cannot be solved for by time.
        UserError: No candidate was within `tolerance`; the message states the nearest and the noise.
    """
    for name in free or ():
        if name not in (MLP, DEPTH):
            raise FieldError("--free", name, "cannot be solved for by time", f"use {MLP} or {DEPTH}")
    degrees = degrees or Degrees.of(variant)
    degrees.check(variant)
    model = _TimeModel(base, variant, measure, log, degrees.width_step)
    model.start(with_depth=free is None or DEPTH in free)
    with_width, with_depth = free is None or MLP in free, free is None or DEPTH in free
    for _ in range(MAX_TRIES):
        shape = model.predict(with_width=with_width, with_depth=with_depth)
        ratio, noise = model.measure_shapes([shape])
        if abs(ratio - 1) <= tolerance:
            config = model.build_config(shape)
            found = build_match(counted_costs(base), config, start=variant, fields=(DEPTH, MLP))
            return replace(found, ratios={**found.ratios, "time": ratio})
    nearest, ratio = model.find_nearest()
    raise UserError(
        f"attention.kind={variant.attention.kind}: after {MAX_TRIES} tries, the nearest match in time is "
        f"{DEPTH}={nearest[0]}, {MLP}={nearest[1]}, with a difference of {ratio - 1:+.1%}, more than "
        f"{tolerance:.1%}; rounds differ by {noise:.1%}; measure more rounds without other load, "
        f"free {DEPTH} and {MLP}, or use a larger base"
    )


class _TimeModel:
    """Step times relative to the base's by shape (layers, MLP width), and a linear model of them."""

    def __init__(
        self,
        base: RunConfig,
        variant: RunConfig,
        measure: RoundTimer,
        log: Callable[[str], None],
        step: int,
    ) -> None:
        self.base, self.variant, self.measure, self.step = base, variant, measure, step
        self.log = log
        self.ratios: dict[tuple[int, int], float] = {}
        self.layers = variant.model.num_layers
        self.width = self._rounded(variant.model.ffn_hidden_size)

    def start(self, *, with_depth: bool) -> None:
        """Measure the variant, the variant with a narrower MLP, and with fewer layers."""
        shapes = [(self.layers, self.width), (self.layers, self._rounded(self.width / 2))]
        if with_depth:
            shapes.append((max(1, self.layers // 2), self.width))
        self.measure_shapes(list(dict.fromkeys(shapes)))

    def predict(self, *, with_width: bool, with_depth: bool) -> tuple[int, int]:
        """Return the shape whose predicted time equals the base's.

        It has the variant's depth if some width suffices, otherwise the width nearest to the base's.
        """
        constant, by_layer, by_width = self._fit()
        depths = range(1, 4 * self.layers + 1) if with_depth else [self.layers]
        base_width = self.base.model.ffn_hidden_size
        candidates = []
        for layers in depths:
            width = self.width
            if with_width:
                width = self._rounded((1 - constant - by_layer * layers) / max(by_width * layers, 1e-12))
            expected = constant + by_layer * layers + by_width * layers * width
            candidates.append((abs(expected - 1), abs(width / base_width - 1), layers, width))
        close = [candidate for candidate in candidates if candidate[0] <= TOLERANCE / 2] or candidates
        same_depth = [candidate for candidate in close if candidate[2] == self.layers]
        if same_depth and with_width:
            best = same_depth[0]
        else:
            best = min(close, key=lambda candidate: (candidate[1], candidate[0]))
        return best[2], best[3]

    def find_nearest(self) -> tuple[tuple[int, int], float]:
        """Return the measured shape whose time is nearest to the base's, and its ratio."""
        return min(self.ratios.items(), key=lambda item: abs(item[1] - 1))

    def build_config(self, shape: tuple[int, int]) -> RunConfig:
        """Return the variant with this number of layers and MLP width."""
        return self.variant.replaced({DEPTH: shape[0], MLP: shape[1]})

    def measure_shapes(self, shapes: list[tuple[int, int]]) -> tuple[float, float]:
        """Measure shapes; return the median ratio of the last one and its range over rounds."""
        rounds = self.measure([self.base, *(self.build_config(shape) for shape in shapes)])
        for index, shape in enumerate(shapes, start=1):
            ratios = [seconds[index] / seconds[0] for seconds in rounds]
            self.ratios[shape] = statistics.median(ratios)
            noise = max(ratios) - min(ratios)
            self.log(
                f"{self.variant.attention.kind}, {DEPTH}={shape[0]}, {MLP}={shape[1]}: "
                f"{self.ratios[shape]:.3f} of the base's time; rounds differ by {noise:.3f}"
            )
        return self.ratios[shapes[-1]], noise

    def _fit(self) -> tuple[float, float, float]:
        rows = [(1.0, layers, layers * width) for layers, width in self.ratios]
        if len({layers for layers, _ in self.ratios}) == 1:
            # With a single depth, the constant and the time per layer cannot be separated.
            rows = [(0.0, layers, product) for _, layers, product in rows]
        constant, by_layer, by_width = np.linalg.lstsq(
            np.array(rows), list(self.ratios.values()), rcond=None
        )[0]
        return float(constant), float(by_layer), float(by_width)

    def _rounded(self, width: float) -> int:
        return max(1, round(width / self.step)) * self.step
