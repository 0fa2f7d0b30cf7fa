"""What a run measured inside its model: values by name, evaluation and layer, from metrics.jsonl. No torch.

A record of the kind `update` belongs to the record of the kind `probe` of the same step. Nested values have
names with dots, such as `copy_similarity.query`. Of values by head, the largest score is the largest of all
heads, and the entropy their mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = float | None
# How values of all heads or layers are joined, if not by their mean.
_JOINED_BY: dict[str, Callable[[Sequence[float]], float]] = {"largest_score": max}


@dataclass(frozen=True)
class LayerMeasurements:
    """The measurements of a run.

    Attributes:
        steps: The steps after which the model was measured, in ascending order.
        curves: For each name, the mean over the layers at each step; the largest value for the largest score.
        layers: For each name, the value of each layer at the last step; for updates, at the last step with
            one, since the learning rate may end at 0. None for values that were not measured or not finite.
    """

    steps: list[int] = field(default_factory=list)
    curves: dict[str, list[Value]] = field(default_factory=dict)
    layers: dict[str, list[Value]] = field(default_factory=dict)


def join_measurements(records: Iterable[tuple[int, Sequence[Mapping[str, Any]]]]) -> LayerMeasurements:
    """Return the measurements of the steps and layers of records; of a repeated step, the last ones.

    A run that was resumed from an older checkpoint has measured the steps after it twice.
    """
    by_step: dict[int, dict[int, dict[str, Value]]] = {}
    for step, layers in records:
        for later in [known for known in by_step if known > step]:
            del by_step[later]
        for entry in layers:
            by_step.setdefault(step, {}).setdefault(entry["layer"], {}).update(_flatten(entry))
    steps = sorted(by_step)
    names = dict.fromkeys(
        name for layers in by_step.values() for values in layers.values() for name in values
    )
    by_layer = {
        name: [[values.get(name) for _, values in sorted(by_step[step].items())] for step in steps]
        for name in names
    }
    return LayerMeasurements(
        steps,
        {name: [_join(name, layers) for layers in values] for name, values in by_layer.items()},
        {name: values[find_last(name, values)] for name, values in by_layer.items()},
    )


def find_last(name: str, values: Sequence[Any]) -> int:
    """Return the index of the last step of a measurement; for updates, of the last step with one.

    Args:
        name: The measurement's name.
        values: At each step, the mean over the layers or the values of the layers.
    """
    last = len(values) - 1
    if not name.startswith("update_ratio"):
        return last
    for index in range(last, -1, -1):
        of_step = values[index] if isinstance(values[index], list) else [values[index]]
        if any(of_step):  # neither 0 nor None
            return index
    return last


def _flatten(entry: Mapping[str, Any]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            values |= {f"{name}.{part}": of_part for part, of_part in value.items()}
        elif isinstance(value, Sequence):
            values[name] = _join(name, value)
        elif name != "layer":
            values[name] = value
    return values


def _join(name: str, values: Sequence[Value]) -> Value:
    """Join values of heads or layers; None unless all are known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return _JOINED_BY.get(name, statistics.fmean)(known)
