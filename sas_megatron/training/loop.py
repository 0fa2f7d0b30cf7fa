"""The training loop of one rank.

`Run` prepares a run: token files -> samples (`run_data`), config -> model and optimizer (`build`), and the
newest checkpoint, if there is one. `Run.complete` then repeats

    microbatches -> `step.train_step` -> health checks -> record -> (evaluate) -> (save a checkpoint)

until the last step, or until a signal or the time limit requests a stop, and writes summary.json. Every rank
executes the same sequence. Rank 0 alone writes the run directory and the console (`records`, `run_files`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import asdict

import torch

from sas_megatron.checkpoint.restoring import restore_random_states
from sas_megatron.checkpoint.saving import CheckpointSaver
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.communication_counter import gather_communication_counters
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology, build_communication_counter
from sas_megatron.evaluation.held_out import HeldOutLoss, evaluate_held_out
from sas_megatron.fault_tolerance.stop_request import RunExit, StopRequest
from sas_megatron.training.build import build_engine
from sas_megatron.training.engine import Engine
from sas_megatron.training.health_monitor import HealthMonitor
from sas_megatron.training.records import Recorder
from sas_megatron.training.run_data import RunData
from sas_megatron.training.run_files import RunFiles
from sas_megatron.training.run_probe import RunProbe
from sas_megatron.training.starting_point import find_starting_point
from sas_megatron.training.step import StepResult, train_step
from sas_megatron.training.step_profiler import StepProfiler
from sas_megatron.training.summary import SessionResults


class Run:
    """One training run on this rank.

    Args:
        config: The run.
        topology: This rank's position in the run, with its process groups.
        stop: Requests to stop; without it, only `training.stop_after_seconds` can request one.
        peak_flops: Peak FLOP/s of one rank's device, for the logged MFU; None if unknown.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        stop: StopRequest | None = None,
        *,
        peak_flops: float | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.config = config
        self.topology = topology
        self.stop = stop or StopRequest(after_seconds=config.training.stop_after_seconds)
        self.recorder = Recorder(config, topology, peak_flops=peak_flops)
        self.data = RunData(config, topology)
        self.saver = CheckpointSaver(RunFiles.checkpoints(config), config, topology)
        self.start = find_starting_point(config, log=self.recorder.log)
        self.engine: Engine = build_engine(config, initial_weights=self.start.weights_folder)
        self.progress = self.start.read_progress()
        self.last_step: StepResult | None = None
        self.held_out: HeldOutLoss | None = None
        self.probe = RunProbe(self.engine, topology, self.progress, recorder=self.recorder)
        self.health = HealthMonitor(config, topology, self.progress.health, recorder=self.recorder)
        self.communication_counter = build_communication_counter(topology)
        self.profiler = StepProfiler(config.logging, rank=topology.rank, device=topology.device)

    def complete(self) -> RunExit:
        """Train to the last step, to `training.stop_after_steps`, or until a stop is requested.

        Returns:
            The reason why training ended.

        Raises:
            TrainingFault: A finding of the health checks ends the run.
            FileProblem: A file of the run cannot be written, or another session has taken over the run.
        """
        training, checkpoint = self.config.training, self.config.checkpoint
        self._restore()
        self._report_finished_step()
        last_step = min(training.num_steps, training.stop_after_steps or 2**62)
        run_exit = RunExit("finished" if last_step == training.num_steps else "stop_after_steps")
        if self.progress.step >= last_step and RunFiles(self.config).has_summary():
            self.recorder.log(f"already finished at step {self.progress.step}; nothing to do")
            return run_exit
        self.recorder.open(self.start, resumed_step=self.progress.step)
        self.stop.begin_steps()
        try:
            if self.progress.owes_evaluation:
                self._evaluate()
            while self.progress.step < last_step:
                step = self.progress.step + 1
                with self.probe.measured_step(), self.profiler.step(step), self.health.measured(step):
                    stop_requested = self._step().stop_requested
                self.health.check_replicas(self.engine, step)
                if stop_requested and self.progress.step < last_step:
                    run_exit = self._stop()
                    break
                if self._is_due(self.config.evaluation.interval):
                    self._evaluate()
                self.saver.finish_if_written()
                if checkpoint.is_due(self.progress.step):
                    self._save()
            self._finish(run_exit)
        finally:
            self.recorder.close()
        return run_exit

    def _restore(self) -> None:
        """Restore the engine, the random states and the schedule from the checkpoint, if there is one."""
        checkpoint = self.start.checkpoint
        if checkpoint is not None:
            self.engine.restore(checkpoint)
            restore_random_states(checkpoint, self.config, log=self.recorder.log)
            self.engine.schedule.step(checkpoint.progress["schedule_steps"])
            self.recorder.log(f"resuming from {checkpoint.path} at step {self.progress.step}")

    def _step(self) -> StepResult:
        """Run one optimizer step, check and count it, and record it if it is due."""
        num_samples = self.config.training.global_batch_size
        self._synchronize()
        start_time = time.perf_counter()
        with self._counted_communication():
            result = train_step(
                self.engine,
                self.data.training_batches(self.progress.consumed_samples),
                num_microbatches=self.data.num_microbatches(num_samples),
                topology=self.topology,
                check=self.health.rules.check_step,
                stop_requested=lambda: self.stop.reason is not None,
            )
        self._synchronize()
        seconds = time.perf_counter() - start_time - self.probe.seconds
        self.last_step = result
        self.health.count_step(result, self.progress.step + 1)
        self.progress.count_step(num_samples, seconds)
        self._report_finished_step()
        self.recorder.console.advance(self.progress.step)
        # A step that is not finite has a health record instead.
        if result.is_finite and (self.progress.step == 1 or self._is_due(self.config.logging.interval)):
            self.recorder.log_step(self.progress, result, seconds)
        return result

    def _stop(self) -> RunExit:
        """Agree on the reason to stop: that of the first rank that has one.

        Time is short, so an evaluation that is due now is left to the resumed run.
        """
        reasons = [reason for reason in gather_from_ranks(self.stop.reason) if reason is not None]
        self.progress.owes_evaluation = self._is_due(self.config.evaluation.interval)
        left = "; the evaluation after it is left to the resumed run" if self.progress.owes_evaluation else ""
        self.recorder.log(f"stopping after step {self.progress.step}: {reasons[0]}{left}")
        self.held_out = None
        return RunExit(reasons[0], is_resumable=True)

    def _evaluate(self) -> None:
        """Compute the validation loss and record it."""
        num_microbatches = self.data.num_microbatches(self.config.evaluation.num_sequences)
        self.held_out = held_out = evaluate_held_out(
            functools.partial(self.engine.forward, num_microbatches=num_microbatches),
            self.data.validation_batches(),
            byte_lengths=self.data.byte_lengths,
            topology=self.topology,
        )
        self.progress.count_evaluation(held_out.loss)
        self.recorder.log_validation(self.progress, held_out)
        self.probe.measure(self.data)

    def _save(self) -> None:
        """Save a checkpoint, after the records up to it have been synced to disk."""
        self.recorder.sync()
        self.saver.save(
            self.progress.step,
            shards=self.engine.shards(),
            progress={
                "counts": asdict(self.progress),
                "schedule_steps": self.engine.schedule.num_steps,
                "engine": self.engine.counts(),
            },
            write_files=self.engine.write_files,
        )

    def _finish(self, run_exit: RunExit) -> None:
        """Evaluate and save if this has not been done at the last step, then write the summary."""
        is_resumable = run_exit.is_resumable
        is_evaluated = self.held_out is not None and self._is_due(self.config.evaluation.interval)
        if not is_resumable and not is_evaluated:
            self._evaluate()
        if is_resumable or not self.config.checkpoint.is_due(self.progress.step):
            self._save()
        self.saver.finish()
        self.recorder.sync()
        self.profiler.close()
        counter, is_counted = self.communication_counter, self.config.logging.communication_counter
        results = SessionResults(
            run_exit,
            seconds=time.perf_counter() - self.started,
            last_step=self.last_step,
            held_out=self.held_out,
            bytes_sent=gather_communication_counters(counter) if is_counted else None,
            health=self.health.summary(),
        )
        self.recorder.write_summary(self.progress, results)
        if is_resumable:
            self.stop.ignore_signals()

    def _report_finished_step(self) -> None:
        if self.topology.failure_watchdog is not None:
            self.topology.failure_watchdog.finish_step(self.progress.step)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.step % interval == 0

    def _counted_communication(self) -> contextlib.AbstractContextManager[object]:
        is_counted = self.config.logging.communication_counter
        return self.communication_counter if is_counted else contextlib.nullcontext()

    def _synchronize(self) -> None:
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)
