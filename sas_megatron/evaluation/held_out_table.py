"""Held-out loss by length of the context, by domain and by position: the table that summary.json holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sas_megatron.evaluation.results import describe_loss
from sas_megatron.evaluation.scoring import Passage
from sas_megatron.evaluation.sliding_window import LossByPosition, measure_windows
from sas_megatron.evaluation.trained_model import TrainedModel
from sas_megatron.evaluation.window_settings import WindowSettings

ALL = "all"

# The windows of a domain, cut as the settings say.
Domain = Callable[[WindowSettings], Iterable[Passage]]


def measure_held_out(
    model: TrainedModel, domains: Mapping[str, Domain], settings: Sequence[WindowSettings]
) -> dict[str, Any]:
    """The same on every rank, and all must call it alike; domains by name, settings for each length."""
    return {
        "trained_length": model.config.data.sequence_length,
        "by_length": [_measure_length(model, domains, of_length) for of_length in settings],
    }


def _measure_length(
    model: TrainedModel, domains: Mapping[str, Domain], settings: WindowSettings
) -> dict[str, Any]:
    begun = time.perf_counter()
    found = {
        name: measure_windows(model, windows(settings), batch_tokens=settings.batch_tokens)
        for name, windows in domains.items()
    }
    together = sum(found.values(), LossByPosition())
    return {
        "sequence_length": settings.length,
        "stride": settings.stride,
        "seconds": time.perf_counter() - begun,
        ALL: _describe(together),
        "domains": {name: _describe(loss) for name, loss in found.items()},
    }


def _describe(loss: LossByPosition) -> dict[str, Any]:
    positions = [
        {"tokens_read": [last // 2 + 1, last], **describe_loss(of_bucket)}
        for last, of_bucket in loss.by_position()
    ]
    return {**describe_loss(loss.total()), "by_position": positions}
