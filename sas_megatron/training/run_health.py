"""What a run makes of its health: lines on the console, records, and the faults that end it.

A record of kind `health` in metrics.jsonl is one event:
    non_finite, spike   of a step's loss or gradient norm, and the response: record, skip or stop
    own_time            seconds that each rank needed by itself for the step, and stragglers among them
    drift               the copies of weights that differ; the run ends
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.training.engine import Engine
from sas_megatron.training.health import (
    Finding,
    HealthHistory,
    HealthWatch,
    TrainingFault,
    describe_finding,
)
from sas_megatron.training.replicas import find_drift
from sas_megatron.training.step import StepResult
from sas_megatron.training.stragglers import OwnTime, find_stragglers

REMEDY = "lower optimizer.learning_rate or look at that step's samples"


class RunHealth:
    """The `health` section at work on one rank.

    `say` is given lines for the console, `record` the fields of an event; `history` is that of the
    run's progress, which counts on.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        history: HealthHistory,
        *,
        say: Callable[[str], None],
        record: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self.config = config.health
        self.profile_steps = config.logging.profile_steps
        self.topology = topology
        self.watch = HealthWatch(config.health, history)
        self._say = say
        self._record = record
        # Of this session's measured steps, own seconds and all seconds of each rank.
        self._own_seconds = [0.0] * topology.world_size
        self._step_seconds = 0.0

    def take(self, result: StepResult, step: int) -> None:
        """Counts and tells what was found in a step.

        Raises:
            TrainingFault: a finding asks for it, or too many steps in a row would be skipped.
        """
        if result.is_applied:
            self.watch.count_update(result.loss, result.gradient_norm)
        for finding in result.findings:
            self.watch.count_finding(finding, dict.fromkeys(faulty.rank for faulty in result.faulty_losses))
            self._tell(finding, result, step)
        if not result.is_applied:
            self.watch.count_skip()

    def _tell(self, finding: Finding, result: StepResult, step: int) -> None:
        culprits = list(map(str, result.faulty_losses))
        wrong = describe_finding(finding, loss=result.loss, culprits=culprits)
        allowed, in_a_row = self.config.skipped_in_a_row, self.watch.history.skipped_in_a_row
        stops = finding.response == "stop" or (finding.response == "skip" and in_a_row >= allowed)
        self._record(step, {**_event(finding, result), "response": "stop" if stops else finding.response})
        if stops:
            after = f" after {in_a_row} skipped in a row (health.skipped_in_a_row)" if in_a_row else ""
            raise TrainingFault(f"step {step}{after}: {wrong}; {REMEDY}")
        skipped = f"; skipped, {in_a_row + 1} in a row" if finding.response == "skip" else ""
        self._say(f"step {step}: {wrong}{skipped}")

    def check_replicas(self, engine: Engine, step: int) -> None:
        """Where it is due after `step`; every rank must call it.

        Raises:
            TrainingFault: copies of weights differ.
        """
        interval = self.config.replica_check_interval
        if interval is None or step % interval:
            return
        engine.sync_parameters()
        drift = find_drift(engine.pieces, self.topology)
        if drift is not None:
            self._record(step, {"event": "drift", "differing": drift})
            raise TrainingFault(
                f"after step {step} copies of the same weights are not equal: {drift}; go on from an earlier "
                "checkpoint, and look at the memory of those ranks' devices and at what sums these gradients"
            )

    @contextlib.contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """What runs within is `step`: each rank's own time is measured where it is due; all must enter it."""
        interval, profiled = self.config.straggler_interval, self.profile_steps
        # torch has one profiler at a time.
        if interval is None or step % interval or (profiled and profiled[0] <= step <= profiled[1]):
            yield
            return
        own_time, begun = OwnTime(self.topology.device), time.perf_counter()
        with own_time.measure():
            yield
        self._step_seconds += time.perf_counter() - begun
        of_ranks = gather_from_ranks((own_time.seconds, self.topology.pipeline_rank))
        self._tell_own_time([own for own, _ in of_ranks], [stage for _, stage in of_ranks], step)
        self._own_seconds = [total + own for total, (own, _) in zip(self._own_seconds, of_ranks, strict=True)]

    def _tell_own_time(self, own_seconds: list[float], stages: list[int], step: int) -> None:
        stragglers = find_stragglers(own_seconds, stages, excess=self.config.straggler_excess)
        self._record(
            step,
            {
                "event": "own_time",
                "own_seconds_by_rank": own_seconds,
                "stragglers": {str(rank): ratio for rank, ratio in stragglers.items()},
            },
        )
        if stragglers:
            slowest = max(stragglers, key=lambda rank: stragglers[rank])
            self._say(
                f"step {step}: rank {slowest} needs {own_seconds[slowest]:.3f} s by itself, "
                f"{stragglers[slowest]:.2f} times the median of its pipeline stage"
            )

    def summary(self) -> dict[str, Any]:
        """For summary.json: counts of the whole run, and each rank's own share of this session's time."""
        shares = [own / self._step_seconds for own in self._own_seconds] if self._step_seconds else None
        return {**self.watch.history.counts(), "own_time_share_by_rank": shares}


def _event(finding: Finding, result: StepResult) -> dict[str, Any]:
    """JSON has no number that is not finite: such a value is given in words."""
    if finding.spike is not None:
        return {
            "event": "spike",
            "quantity": finding.quantity,
            "value": finding.value,
            "median": finding.spike.median,
            "deviations": finding.spike.deviations,
        }
    event: dict[str, Any] = {
        "event": "non_finite",
        "quantity": finding.quantity,
        "value": str(finding.value),
    }
    if result.faulty_losses:
        event["ranks"] = list(dict.fromkeys(faulty.rank for faulty in result.faulty_losses))
    return event
