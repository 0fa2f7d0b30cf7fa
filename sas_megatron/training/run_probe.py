"""What happens inside a model in training: before each evaluation, the gradient and the update of a step.

step before an evaluation -> gradient before clipping, weights before and after the update
  -> sums of this rank's elements -> merged over ranks -> norms by layer and part of the layer

The step computes what it would compute without the measurement, whose time is not part of the step's.
`RunProbe.measure` adds what `evaluation.probes` measures on the fixed probe batch.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.evaluation.probes import probe_model
from sas_megatron.training.engine import Engine
from sas_megatron.training.metrics import Progress
from sas_megatron.training.records import Recorder
from sas_megatron.training.run_data import RunData

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
# Beginnings of parameter names in a layer, the first that fits, and the part that they belong to. A norm
# belongs to the branch that it begins.
_PARTS = {
    "self_attention.simulation.": "simulation",
    "self_attention.": "attention",
    "input_layernorm.": "attention",
    "": "mlp",
}


@dataclass
class PartSums:
    """Sums of squares over the elements of one part of a layer."""

    gradients: float = 0.0
    weights: float = 0.0
    updates: float = 0.0

    def add(self, other: PartSums) -> None:
        """Add the sums over other elements."""
        self.gradients += other.gradients
        self.weights += other.weights
        self.updates += other.updates


# Layer, counted from 1 -> part -> sums.
LayerParts = dict[int, dict[str, PartSums]]


@dataclass
class UpdateMeasurement:
    """Measures the gradients and the update of one step on this rank.

    Call `before_update` between `compute_gradient_norm` and `update`, and `after_update` after it.
    """

    engine: Engine
    sums: LayerParts = field(default_factory=dict)
    is_complete: bool = False
    _weights: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def before_update(self) -> None:
        """Add up the gradients, and copy the weights to the memory of the CPU."""
        for tensor in self.engine.trained_tensors():
            weights, gradient = tensor.read_weights(), tensor.read_gradient()
            sums = self._sums_of(tensor.name)
            if sums is not None and tensor.is_counted:
                sums.add(PartSums(gradients=_square_sum(gradient), weights=_square_sum(weights)))
                self._weights[tensor.name, tensor.first_element] = weights.to("cpu", copy=True)

    def after_update(self) -> None:
        """Add up the changes of the weights."""
        for tensor in self.engine.trained_tensors():
            weights = tensor.read_weights()
            before = self._weights.pop((tensor.name, tensor.first_element), None)
            sums = self._sums_of(tensor.name)
            if sums is not None and before is not None:
                sums.add(PartSums(updates=_square_sum(weights - before.to(weights.device))))
        self.is_complete = True

    def results(self) -> list[dict[str, Any]]:
        """Return an entry for each layer, the same on every rank; every rank must call this."""
        merged: LayerParts = {}
        for of_rank in gather_from_ranks(self.sums):
            for layer, parts in of_rank.items():
                for part, sums in parts.items():
                    merged.setdefault(layer, {}).setdefault(part, PartSums()).add(sums)
        return [_describe_layer(layer, parts) for layer, parts in sorted(merged.items())]

    def _sums_of(self, name: str) -> PartSums | None:
        """Return the sums that a parameter belongs to; None for parameters outside of the layers."""
        found = _LAYER.fullmatch(name)
        if found is None:
            return None
        part = next(part for beginning, part in _PARTS.items() if found[2].startswith(beginning))
        return self.sums.setdefault(int(found[1]) + 1, {}).setdefault(part, PartSums())


def _describe_layer(layer: int, parts: dict[str, PartSums]) -> dict[str, Any]:
    """Return the norms of a layer as metrics.jsonl contains them; None for values that are not finite."""
    ordered = sorted(parts.items())
    return {
        "layer": layer,
        "gradient_norm": {name: _finite(math.sqrt(sums.gradients)) for name, sums in ordered},
        "update_ratio": {
            name: _finite(math.sqrt(sums.updates / sums.weights)) if sums.weights else None
            for name, sums in ordered
        },
    }


def _square_sum(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class RunProbe:
    """The measurements inside the model of a run, if `evaluation.probe_sequences` is above 0.

    Args:
        engine: The engine that trains the model.
        topology: This rank's position in the run.
        progress: The run's progress, which the training loop updates.
        recorder: Writes the records of the kinds `probe` and `update`.

    Attributes:
        seconds: The time that the measurement of the current step has taken.
    """

    def __init__(self, engine: Engine, topology: Topology, progress: Progress, *, recorder: Recorder) -> None:
        self.engine, self.topology, self.progress, self.recorder = engine, topology, progress, recorder
        self.is_on = engine.config.evaluation.probe_sequences > 0
        self.seconds = 0.0

    def measure(self, data: RunData) -> None:
        """Measure the forward pass of the probe batch and record it; every rank must call this."""
        if self.is_on:
            layers = probe_model(self.engine, data, config=self.engine.config, topology=self.topology)
            self.recorder.log_probe("probe", self.progress, layers)

    @contextlib.contextmanager
    def measured_step(self) -> Iterator[None]:
        """Measure the update of the step within the block if an evaluation follows; all ranks must enter it.

        A skipped step has no update and no record.
        """
        self.seconds = 0.0
        if not (self.is_on and self._is_evaluated_after(self.progress.step + 1)):
            yield
            return
        measurement, update = UpdateMeasurement(self.engine), self.engine.update

        def measured_update(gradient_norm: float) -> None:
            with self._timed():
                measurement.before_update()
            update(gradient_norm)
            with self._timed():
                measurement.after_update()

        self.engine.update = measured_update  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.engine.update = update  # type: ignore[method-assign]
        if measurement.is_complete:
            self.recorder.log_probe("update", self.progress, measurement.results())

    def _is_evaluated_after(self, step: int) -> bool:
        training, interval = self.engine.config.training, self.engine.config.evaluation.interval
        is_last = step in (training.num_steps, training.stop_after_steps)
        return is_last or (interval is not None and step % interval == 0)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        self._synchronize()
        start_time = time.perf_counter()
        yield
        self._synchronize()
        self.seconds += time.perf_counter() - start_time

    def _synchronize(self) -> None:
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)
