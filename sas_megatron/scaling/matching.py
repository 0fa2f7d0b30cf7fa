"""Fair matches: a variant's free dimensions, so that it costs what a base costs on one axis.

base, variant -> every legal choice of the attention's free dimensions
  -> for each the MLP width that brings it nearest to the base -> those within tolerance
  -> the one whose MLP stays nearest to the base's, so that attention pays for attention
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activations import count_kv_cache_bytes
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters

# Matrix widths in multiples of 8 fill the tensor cores' tiles in 16-bit precision (NVIDIA's
# "Matrix Multiplication Background" guide); each rank's share of the width should be one.
WIDTH_MULTIPLE = 8
# Largest difference of a match, as a share of the base's cost.
TOLERANCE = 0.01
MLP, DEPTH = "model.ffn_hidden_size", "model.num_layers"
# How far up from where it starts a dimension is looked for.
LARGEST_FACTOR = 16
LARGEST_COUNT_FACTOR = 8
COUNTS = (DEPTH, "attention.num_heads", "attention.num_kv_heads")

# What a match may be equal on, of those that are counted (a step's time is measured, in `time_matching`).
COUNTED_AXES = ("params", "flops", "kv")


@dataclass(frozen=True)
class Degrees:
    """The tensor- and context-parallel sizes that a match must allow, each with each."""

    tensor: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (1,)

    @staticmethod
    def of(config: RunConfig) -> Degrees:
        """Those of a run's own layout."""
        return Degrees((config.parallel.tensor,), (config.parallel.context,))

    @property
    def width_step(self) -> int:
        """What an MLP width must be a multiple of, so that each rank's share of it is one of 8."""
        return WIDTH_MULTIPLE * math.lcm(*self.tensor)

    def check(self, config: RunConfig) -> None:
        """Raises `FieldError` where the heads do not divide."""
        for tensor, context in itertools.product(self.tensor, self.context):
            config.attention.check_tensor_parallel(tensor)
            config.attention.check_context_parallel(tensor, context)


@dataclass(frozen=True)
class Match:
    """A variant's config, and what it costs for each unit of the base's cost, by axis."""

    config: RunConfig
    ratios: dict[str, float]
    # The solved fields, and what they were before.
    changes: dict[str, tuple[int, int]] = field(default_factory=dict)


def counted_costs(config: RunConfig) -> dict[str, int]:
    """By axis: parameters, training FLOPs a token at the config's length, KV-cache bytes a token."""
    return {
        "params": sum(count_parameters(config).values()),
        "flops": sum(count_training_flops(config).values()),
        "kv": sum(count_kv_cache_bytes(config).values()),
    }


def match(
    base: RunConfig,
    variant: RunConfig,
    *,
    axis: str,
    free: tuple[str, ...] | None = None,
    degrees: Degrees | None = None,
    tolerance: float = TOLERANCE,
) -> Match:
    """`variant`, changed in its free dimensions until it costs what `base` does.

    Args:
        base: the run to equal.
        variant: a run with the attention to match; what is not free stays as it is.
        axis: one of `COUNTED_AXES`.
        free: fields to solve for; None: those of the attention that its class names, and the MLP's width;
            then depth too, where these are not enough. Where the MLP's width has no part in the axis (kv),
            it is solved for equal parameters.
        degrees: what the heads must divide by; None: what the variant's own layout needs.
        tolerance: largest difference on the axis, as a share of the base's cost.

    Raises:
        UserError: nothing within `tolerance`; says by how much, and what would have to give.
    """
    degrees = degrees or Degrees.of(variant)
    choices = _default_fields(variant, axis) if free is None else [free]
    for fields in choices:
        search = _Search(base, variant, axis=axis, fields=fields, degrees=degrees, tolerance=tolerance)
        found = list(search.matches())
        if found:
            return min(found, key=search.deviation)
    raise search.failure()


def _default_fields(variant: RunConfig, axis: str) -> list[tuple[str, ...]]:
    attention = variant.attention
    names = attention.cache_dimensions if axis == "kv" else attention.size_dimensions
    fields = (*(f"attention.{name}" for name in names), MLP)
    return [fields] if axis == "kv" else [fields, (DEPTH, *fields)]


class _Search:
    """One variant against one base, over every legal choice of some fields."""

    def __init__(
        self,
        base: RunConfig,
        variant: RunConfig,
        *,
        axis: str,
        fields: tuple[str, ...],
        degrees: Degrees,
        tolerance: float,
    ) -> None:
        self.base, self.variant, self.axis, self.fields = base, variant, axis, fields
        self.degrees, self.tolerance = degrees, tolerance
        self.target = counted_costs(base)
        # For the message, should nothing be found: the choice that came nearest, and the last refused.
        self.nearest: Match | None = None
        self.refusal: UserError | None = None

    def matches(self) -> Iterator[Match]:
        """The choices within tolerance, each with the nearest MLP width where that is free."""
        names = [name for name in self.fields if name != MLP]
        for values in itertools.product(*(self._values(name) for name in names)):
            changes = dict(zip(names, values, strict=True))
            try:
                if self.axis == "kv" and not self._may_keep_as_much(changes):
                    continue
                candidate = self._candidate(changes)
            except UserError as refusal:
                self.refusal = refusal
                continue
            if self.nearest is None or self._distance(candidate) < self._distance(self.nearest):
                self.nearest = candidate
            if self._distance(candidate) <= self.tolerance:
                yield candidate

    def _candidate(self, changes: dict[str, int]) -> Match:
        config = self.variant.replaced(changes)
        self.degrees.check(config)
        if MLP in self.fields:
            config = self._with_nearest_width(config)
        return compare(self.target, config, start=self.variant, fields=self.fields)

    def _distance(self, candidate: Match) -> float:
        return abs(candidate.ratios[self.axis] - 1)

    def _may_keep_as_much(self, changes: dict[str, int]) -> bool:
        """Whether the cache is near the base's; told from the attention alone, as most choices are not."""
        fields = {name.removeprefix("attention."): value for name, value in changes.items() if name != DEPTH}
        attention = self.variant.attention
        changed = type(attention).model_validate(attention.model_dump(exclude_unset=True) | fields)
        layers = changes.get(DEPTH, self.variant.model.num_layers)
        kept = layers * sum(build_attention_costs(changed).count_kv_cache_elements().values())
        wanted = self.base.model.num_layers * sum(
            build_attention_costs(self.base.attention).count_kv_cache_elements().values()
        )
        margin = max(2 * self.tolerance, 0.1)
        return abs(kept / wanted - 1) <= margin

    def _values(self, name: str) -> list[int]:
        steps = {f"attention.{field}": step for field, step in self.variant.attention.dimension_steps.items()}
        steps[DEPTH] = 1
        if name not in steps:
            raise FieldError(
                "--free",
                name,
                f"cannot be solved for with {self._kind}",
                f"use some of {', '.join([MLP, *steps])}",
            )
        start, step = _stated(self.variant, name), steps[name]
        if name == "attention.num_heads":
            step = math.lcm(step, *self.degrees.tensor)
        factor = LARGEST_COUNT_FACTOR if name in COUNTS else LARGEST_FACTOR
        # What stands in the config is a choice too, whatever multiple it is.
        return sorted({start, *range(step, factor * max(start, step) + 1, step)})

    def _with_nearest_width(self, config: RunConfig) -> RunConfig:
        """The MLP width, a multiple of 8 on each rank, with which the config costs nearest to the base.

        Parameters and FLOPs are affine in the width, so two counts give the line and the line gives it.
        """
        axis = "params" if self.axis == "kv" else self.axis
        one, two = (
            counted_costs(_with_width(config, count * self.degrees.width_step))[axis] for count in (1, 2)
        )
        per_step, without_mlp, target = two - one, 2 * one - two, self.target[axis]
        if without_mlp >= target:
            raise UserError(
                f"{self._kind}: without any MLP it has {without_mlp:,} {axis}, the base with its MLP "
                f"{target:,}; give the variant fewer or narrower heads, or the base a larger {MLP}"
            )
        below = (target - without_mlp) // per_step
        # The smaller of two that are equally near.
        nearest = min((below, below + 1), key=lambda count: abs(without_mlp + count * per_step - target))
        return _with_width(config, max(1, nearest) * self.degrees.width_step)

    def deviation(self, candidate: Match) -> tuple[float, float]:
        """How far the MLP is from the base's (to the nearest percent), then how far all else was moved."""
        width = candidate.config.model.ffn_hidden_size / self.base.model.ffn_hidden_size
        moved = sum(
            math.log(after / before) ** 2
            for name, (before, after) in candidate.changes.items()
            if name != MLP
        )
        return round(abs(width - 1), 2), moved

    @property
    def _kind(self) -> str:
        return f"attention.kind={self.variant.attention.kind}"

    def failure(self) -> UserError:
        """Why there is no match: what came nearest and what was refused, and what would have to give."""
        fields = ", ".join(self.fields)
        refused = "" if self.refusal is None else f"; other choices were refused, the last by: {self.refusal}"
        if self.nearest is None:
            degrees = f"parallel.tensor={list(self.degrees.tensor)} and context={list(self.degrees.context)}"
            return UserError(f"{self._kind}: no choice of {fields} is legal at {degrees}{refused}")
        solved = ", ".join(f"{name}={_value(self.nearest.config, name)}" for name in self.fields)
        steps = self.variant.attention.dimension_steps
        unused = [
            name for name in (*(f"attention.{field}" for field in steps), DEPTH) if name not in self.fields
        ]
        return UserError(
            f"{self._kind}: nearest to the base in {self.axis} is {solved}, "
            f"{self.nearest.ratios[self.axis] - 1:+.1%} off where {self.tolerance:.1%} is allowed "
            f"({MLP} goes in steps of {self.degrees.width_step} = {WIDTH_MULTIPLE} × tensor degrees)"
            f"{refused}; free more ({', '.join(unused)}), ask for fewer degrees, or take a larger base"
        )


def compare(target: dict[str, int], config: RunConfig, *, start: RunConfig, fields: tuple[str, ...]) -> Match:
    """What `config` costs for each unit of the base's `counted_costs`, and which of `fields` differ from
    those of `start`.
    """
    costs = counted_costs(config)
    ratios = {axis: costs[axis] / target[axis] for axis in COUNTED_AXES}
    values = {name: (_stated(start, name), _value(config, name)) for name in fields}
    return Match(config, ratios, {name: pair for name, pair in values.items() if pair[0] != pair[1]})


def _stated(config: RunConfig, name: str) -> int:
    """A field's value; where the config leaves it open, what it defaults to, or a head's width."""
    value = _value(config, name)
    if value is None and name == "attention.num_kv_heads":
        return config.attention.num_key_value_heads
    return int(value or config.attention.query_key_dim)


def _value(config: RunConfig, name: str) -> Any:
    section, _, attribute = name.partition(".")
    return getattr(getattr(config, section), attribute)


def _with_width(config: RunConfig, width: int) -> RunConfig:
    # Multiples of parallel.tensor satisfy the one rule that crosses sections here.
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn_hidden_size": width})})
