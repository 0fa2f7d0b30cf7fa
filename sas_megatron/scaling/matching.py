"""Matching: solve for a variant's free dimensions so that its cost on one axis equals that of a base.

base, variant -> all valid choices of the attention's free dimensions
  -> for each, the MLP width whose cost is nearest to the base -> choices within the tolerance
  -> the choice whose MLP width is nearest to the base's, so that attention compensates for attention
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.head_layout import check_context_parallel, check_tensor_parallel
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activations import count_kv_cache_bytes
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters

# Tensor cores are used efficiently in 16-bit precision if matrix widths are multiples of 8 (NVIDIA's "Matrix
# Multiplication Background" guide); this applies to each rank's shard of the width.
WIDTH_MULTIPLE = 8
# Largest difference of a match, relative to the base's cost.
TOLERANCE = 0.01
MLP, DEPTH = "model.ffn_hidden_size", "model.num_layers"
# Upper limits of the search, as multiples of a dimension's initial value.
LARGEST_FACTOR = 16
LARGEST_COUNT_FACTOR = 8
MAX_CHOICES = 50_000
COUNTS = (DEPTH, "attention.num_heads", "attention.num_kv_heads")

# Costs that are counted. The time of a step is measured instead, in `time_matching`.
COUNTED_AXES = ("params", "flops", "kv")


@dataclass(frozen=True)
class Degrees:
    """Tensor- and context-parallel sizes that a match must support, in all combinations."""

    tensor: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (1,)

    @staticmethod
    def of(config: RunConfig) -> Degrees:
        """Return the sizes of a run's layout."""
        return Degrees((config.parallel.tensor,), (config.parallel.context,))

    @property
    def width_step(self) -> int:
        """The unit of MLP widths, so that each rank's shard is a multiple of 8."""
        return WIDTH_MULTIPLE * math.lcm(*self.tensor)

    def check(self, config: RunConfig) -> None:
        """Check that the heads can be sharded.

        Raises:
            FieldError: The number of heads is not divisible.
        """
        for tensor, context in itertools.product(self.tensor, self.context):
            check_tensor_parallel(config.attention, tensor)
            check_context_parallel(config.attention, tensor, context)


@dataclass(frozen=True)
class Match:
    """A variant's config and the ratios of its costs to the base's, by axis."""

    config: RunConfig
    ratios: dict[str, float]
    # The changed fields, with their values before and after.
    changes: dict[str, tuple[int, int]] = field(default_factory=dict)


def counted_costs(config: RunConfig) -> dict[str, int]:
    """Return the parameters, training FLOPs per token, and KV-cache bytes per token of a config."""
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
    """Return `variant` with free dimensions at which its cost equals that of `base`.

    Args:
        base: The reference run.
        variant: A run with the attention to match; fields that are not free are unchanged.
        axis: One of `COUNTED_AXES`.
        free: Fields to solve for. None: the fields that the attention's class lists and the MLP width, then
            the depth as well if these are not enough. The MLP width does not affect kv; there it is solved
            for equal parameters.
        degrees: Parallel sizes that the heads must support; None: the sizes of the variant's layout.
        tolerance: Largest difference on the axis, relative to the base's cost.

    Raises:
        UserError: No choice is within `tolerance`; the message states the nearest and possible remedies.
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
    """Search over all valid choices of some fields of one variant."""

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
        # The error message names the nearest choice and the error of the last invalid one.
        self.nearest: Match | None = None
        self.last_error: UserError | None = None

    def matches(self) -> Iterator[Match]:
        """Yield the choices within the tolerance, each with the nearest MLP width if that is free."""
        names = [name for name in self.fields if name != MLP]
        for values in itertools.product(*(self._values(name) for name in names)):
            changes = dict(zip(names, values, strict=True))
            try:
                if self.axis == "kv" and not self._has_similar_cache(changes):
                    continue
                candidate = self._candidate(changes)
            except UserError as error:
                self.last_error = error
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
        return build_match(self.target, config, start=self.variant, fields=self.fields)

    def _distance(self, candidate: Match) -> float:
        return abs(candidate.ratios[self.axis] - 1)

    def _has_similar_cache(self, changes: dict[str, int]) -> bool:
        """Return whether the cache size is near the base's: a fast check that rejects most choices."""
        fields = {name.removeprefix("attention."): value for name, value in changes.items() if name != DEPTH}
        attention = self.variant.attention
        changed = type(attention).model_validate(attention.model_dump(exclude_unset=True) | fields)
        layers = changes.get(DEPTH, self.variant.model.num_layers)
        elements = layers * sum(build_attention_costs(changed).count_kv_cache_elements().values())
        target = self.base.model.num_layers * sum(
            build_attention_costs(self.base.attention).count_kv_cache_elements().values()
        )
        margin = max(2 * self.tolerance, 0.1)
        return abs(elements / target - 1) <= margin

    def _values(self, name: str) -> list[int]:
        steps = {f"attention.{field}": step for field, step in self.variant.attention.dimension_steps.items()}
        steps[DEPTH] = 1
        if name not in steps:
            raise FieldError(
                "--free",
                name,
                f"cannot be solved for with {self._kind}",
                f"use one of {', '.join([MLP, *steps])}",
            )
        start, step = _stated(self.variant, name), steps[name]
        if name == "attention.num_heads":
            step = math.lcm(step, *self.degrees.tensor)
        factor = LARGEST_COUNT_FACTOR if name in COUNTS else LARGEST_FACTOR
        largest = factor * max(start, step)
        if largest // step > MAX_CHOICES:
            raise FieldError(
                name,
                start,
                f"has {largest // step:,} possible values up to {largest:,}, and a search tries at most "
                f"{MAX_CHOICES:,}",
                "use a smaller value, or choose other fields with --free",
            )
        # The value in the config is always a choice, even if it is not a multiple of the step.
        return sorted({start, *range(step, largest + 1, step)})

    def _with_nearest_width(self, config: RunConfig) -> RunConfig:
        """Set the MLP width, a multiple of 8 on each rank, at which the cost is nearest to the base.

        Parameters and FLOPs are affine in the width, so that two counts determine it.

        Raises:
            UserError: Without any MLP, the config costs more than the base.
        """
        axis = "params" if self.axis == "kv" else self.axis
        one, two = (
            counted_costs(_with_width(config, count * self.degrees.width_step))[axis] for count in (1, 2)
        )
        per_step, without_mlp, target = two - one, 2 * one - two, self.target[axis]
        if without_mlp >= target:
            raise UserError(
                f"{self._kind}: without any MLP it has {without_mlp:,} {axis}, but the base with its MLP has "
                f"{target:,}; use fewer or narrower heads in the variant, or a larger {MLP} in the base"
            )
        below = (target - without_mlp) // per_step
        # The smaller width if two are equally near.
        nearest = min((below, below + 1), key=lambda count: abs(without_mlp + count * per_step - target))
        return _with_width(config, max(1, nearest) * self.degrees.width_step)

    def deviation(self, candidate: Match) -> tuple[float, float]:
        """Return the relative difference of the MLP width, rounded to percents, then that of other fields."""
        width = candidate.config.model.ffn_hidden_size / self.base.model.ffn_hidden_size
        others = sum(
            math.log(after / before) ** 2
            for name, (before, after) in candidate.changes.items()
            if name != MLP
        )
        return round(abs(width - 1), 2), others

    @property
    def _kind(self) -> str:
        return f"attention.kind={self.variant.attention.kind}"

    def failure(self) -> UserError:
        """Return an error with the nearest choice, the error of an invalid choice, and possible remedies."""
        fields = ", ".join(self.fields)
        invalid = ""
        if self.last_error is not None:
            invalid = f"; other choices are invalid, for example: {self.last_error}"
        if self.nearest is None:
            degrees = f"parallel.tensor={list(self.degrees.tensor)} and context={list(self.degrees.context)}"
            return UserError(f"{self._kind}: no choice of {fields} is valid for {degrees}{invalid}")
        solved = ", ".join(f"{name}={_value(self.nearest.config, name)}" for name in self.fields)
        steps = self.variant.attention.dimension_steps
        unused = [
            name for name in (*(f"attention.{field}" for field in steps), DEPTH) if name not in self.fields
        ]
        return UserError(
            f"{self._kind}: the nearest match in {self.axis} is {solved}, "
            f"with a difference of {self.nearest.ratios[self.axis] - 1:+.1%}, more than {self.tolerance:.1%} "
            f"({MLP} has steps of {self.degrees.width_step} = {WIDTH_MULTIPLE} × tensor-parallel sizes)"
            f"{invalid}; free more fields ({', '.join(unused)}), require fewer parallel sizes, or use a "
            "larger base"
        )


def build_match(
    target: dict[str, int], config: RunConfig, *, start: RunConfig, fields: tuple[str, ...]
) -> Match:
    """Return the cost ratios of `config` to `target` (the base's `counted_costs`), and the changed `fields`.

    Args:
        target: Costs of the base.
        config: The solved variant.
        start: The variant before solving.
        fields: Fields that may have changed.
    """
    costs = counted_costs(config)
    ratios = {axis: costs[axis] / target[axis] for axis in COUNTED_AXES}
    values = {name: (_stated(start, name), _value(config, name)) for name in fields}
    return Match(config, ratios, {name: pair for name, pair in values.items() if pair[0] != pair[1]})


def _stated(config: RunConfig, name: str) -> int:
    """Return a field's value, or its default if the config does not set it."""
    value = _value(config, name)
    if value is None and name == "attention.num_kv_heads":
        return config.attention.num_key_value_heads
    return int(value or config.attention.query_key_dim)


def _value(config: RunConfig, name: str) -> Any:
    section, _, attribute = name.partition(".")
    return getattr(getattr(config, section), attribute)


def _with_width(config: RunConfig, width: int) -> RunConfig:
    # Validation is not repeated. The only rule across sections is divisibility by parallel.tensor, which
    # the width satisfies.
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn_hidden_size": width})})
