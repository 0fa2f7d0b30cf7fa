"""Applies the `health` section to a run: log lines, records in metrics.jsonl, and the faults that end it.

A record of kind `health` is one event:
    non_finite, spike   a step's loss or gradient norm, and the response: record, skip or stop
    own_time            the seconds that each rank computed in a step, and the stragglers among the ranks
    drift               replicas of weights that differ; the run ends
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.training.engine import Engine
from sas_megatron.training.health import (
    Finding,
    HealthHistory,
    HealthRules,
    TrainingFault,
    describe_finding,
)
from sas_megatron.training.records import Recorder
from sas_megatron.training.replicas import find_drift
from sas_megatron.training.step import StepResult
from sas_megatron.training.stragglers import ComputeTimer, find_stragglers

REMEDY = "lower optimizer.learning_rate or inspect the samples of that step"


class HealthMonitor:
    """The health checks of a run on this rank.

    Args:
        config: The run.
        topology: This rank's position in the run.
        history: The history in the run's progress, which this monitor updates.
        recorder: Writes log lines and health records.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, history: HealthHistory, *, recorder: Recorder
    ) -> None:
        self.config = config.health
        self.profile_steps = config.logging.profile_steps
        self.topology = topology
        self.rules = HealthRules(config.health, history)
        self._recorder = recorder
        # Sums over the measured steps of this session: compute time of each rank, and elapsed time.
        self._compute_seconds = [0.0] * topology.world_size
        self._step_seconds = 0.0

    def count_step(self, result: StepResult, step: int) -> None:
        """Count and record the findings of a step.

        Raises:
            TrainingFault: A finding has the response `stop`, or too many steps in a row would be skipped.
        """
        if result.is_applied:
            self.rules.count_update(result.loss, result.gradient_norm)
        for finding in result.findings:
            self.rules.count_finding(finding, dict.fromkeys(loss.rank for loss in result.non_finite_losses))
            self._record_finding(finding, result, step)
        if not result.is_applied:
            self.rules.count_skip()

    def _record_finding(self, finding: Finding, result: StepResult, step: int) -> None:
        microbatches = list(map(str, result.non_finite_losses))
        problem = describe_finding(finding, loss=result.loss, microbatches=microbatches)
        allowed, in_a_row = self.config.skipped_in_a_row, self.rules.history.skipped_in_a_row
        stops = finding.response == "stop" or (finding.response == "skip" and in_a_row >= allowed)
        response = "stop" if stops else finding.response
        self._recorder.log_health(step, {**_describe_event(finding, result), "response": response})
        if stops:
            after = f" after {in_a_row} skipped in a row (health.skipped_in_a_row)" if in_a_row else ""
            raise TrainingFault(f"step {step}{after}: {problem}; {REMEDY}")
        skipped = f"; skipped, {in_a_row + 1} in a row" if finding.response == "skip" else ""
        self._recorder.log(f"step {step}: {problem}{skipped}")

    def check_replicas(self, engine: Engine, step: int) -> None:
        """Compare the replicas of all weights if this is due after `step`; every rank must call it.

        Raises:
            TrainingFault: Replicas of weights differ.
        """
        interval = self.config.replica_check_interval
        if interval is None or step % interval:
            return
        engine.sync_parameters()
        drift = find_drift(engine.model_chunks, self.topology)
        if drift is not None:
            self._recorder.log_health(step, {"event": "drift", "differing": drift})
            raise TrainingFault(
                f"after step {step} replicas of the same weights differ: {drift}; resume from an earlier "
                "checkpoint, and check the device memory of those ranks and the reduction of these gradients"
            )

    @contextlib.contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Measure the compute time of each rank within the block if it is due; every rank must enter it."""
        interval, profiled = self.config.straggler_interval, self.profile_steps
        # torch supports one active profiler at a time.
        if interval is None or step % interval or (profiled and profiled[0] <= step <= profiled[1]):
            yield
            return
        timer, start_time = ComputeTimer(self.topology.device), time.perf_counter()
        with timer.measure():
            yield
        self._step_seconds += time.perf_counter() - start_time
        by_rank = gather_from_ranks((timer.seconds, self.topology.pipeline_rank))
        seconds = [seconds for seconds, _ in by_rank]
        self._record_compute_time(seconds, [stage for _, stage in by_rank], step)
        totals = zip(self._compute_seconds, seconds, strict=True)
        self._compute_seconds = [total + new for total, new in totals]

    def _record_compute_time(self, seconds: list[float], stages: list[int], step: int) -> None:
        stragglers = find_stragglers(seconds, stages, excess=self.config.straggler_excess)
        self._recorder.log_health(
            step,
            {
                "event": "own_time",
                "own_seconds_by_rank": seconds,
                "stragglers": {str(rank): ratio for rank, ratio in stragglers.items()},
            },
        )
        if stragglers:
            slowest = max(stragglers, key=lambda rank: stragglers[rank])
            self._recorder.log(
                f"step {step}: rank {slowest} is a straggler: it computed for {seconds[slowest]:.3f} s, "
                f"{stragglers[slowest]:.2f} times the median of its pipeline stage"
            )

    def summary(self) -> dict[str, Any]:
        """Return the health section of summary.json.

        It holds the counts of the run, and the share of the measured steps that each rank computed.
        """
        shares = None
        if self._step_seconds:
            shares = [seconds / self._step_seconds for seconds in self._compute_seconds]
        return {**self.rules.history.counts(), "own_time_share_by_rank": shares}


def _describe_event(finding: Finding, result: StepResult) -> dict[str, Any]:
    """Return the event of a finding. Non-finite values are strings, because JSON has no such numbers."""
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
    if result.non_finite_losses:
        event["ranks"] = list(dict.fromkeys(loss.rank for loss in result.non_finite_losses))
    return event
