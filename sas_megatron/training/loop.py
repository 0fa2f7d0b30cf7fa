"""A whole run: assemble or resume, step, evaluate, save, and leave a summary.

data -> engine -> [ step -> record -> (evaluate) -> (save) ]* -> summary
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sas_megatron.checkpoint.loading import (
    Checkpoint,
    find_newest_complete,
    open_checkpoint,
    restore_random_states,
)
from sas_megatron.checkpoint.saving import CheckpointSaver
from sas_megatron.checkpoint.weights_source import WeightsSource, find_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.data.batches import (
    ByteLengths,
    build_training_samples,
    build_validation_samples,
    microbatches,
)
from sas_megatron.data.opening import open_token_files
from sas_megatron.data.token_files import load_manifest
from sas_megatron.distributed.communication_counter import (
    build_communication_counter,
    gather_communication_counters,
)
from sas_megatron.distributed.error_agreement import on_first_rank
from sas_megatron.distributed.gathering import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.evaluation.held_out import HeldOutLoss, evaluate_held_out
from sas_megatron.model.language_loss import Batch
from sas_megatron.platform.device import describe_machine, peak_memory_bytes
from sas_megatron.training.console import Console
from sas_megatron.training.continuation import Branch, find_branch
from sas_megatron.training.engine import Engine, assemble
from sas_megatron.training.metrics import Meter, Progress
from sas_megatron.training.run_files import RunFiles, describe_software
from sas_megatron.training.run_health import RunHealth
from sas_megatron.training.step import StepResult, train_step
from sas_megatron.training.step_profiler import StepProfiler
from sas_megatron.training.stopping import Ending, StopRequest


class Run:
    """One run on one rank."""

    def __init__(self, config: RunConfig, topology: Topology, stop: StopRequest | None = None) -> None:
        self.started = time.perf_counter()
        self.config = config
        self.topology = topology
        self.stop = stop or StopRequest(after_seconds=config.training.stop_after_seconds)
        self.console = Console(config, speaks=topology.is_first)
        self.meter = Meter(config, topology.world_size)
        self.files = RunFiles(config) if topology.is_first else None
        tokenizer = open_token_files(config.data, vocab_size=config.model.vocab_size)
        self.byte_lengths = ByteLengths(tokenizer, topology.device)
        self.training_samples = build_training_samples(
            config.data,
            tokenizer,
            num_samples=config.training.num_ordered_samples,
            seed=config.training.seed,
        )
        self.validation_samples = build_validation_samples(
            config.data, tokenizer, num_samples=config.evaluation.num_sequences
        )
        self.saver = CheckpointSaver(RunFiles.checkpoints(config), config, topology)
        self.branch: Branch | None = None
        self.resumed_from = self._find_checkpoint()
        self.begins_with = self._find_initial_weights()
        self.engine: Engine = assemble(
            config, initial_weights=None if self.begins_with is None else self.begins_with.folder
        )
        counts = {} if self.resumed_from is None else self.resumed_from.progress["counts"]
        self.progress = Progress(**counts)
        self.last: StepResult | None = None
        self.held_out: HeldOutLoss | None = None
        self.health = RunHealth(
            config, topology, self.progress.health, say=self.console.say, record=self._record_health
        )
        self.ledger = build_communication_counter(topology)
        self.profiler = StepProfiler(config.logging, rank=topology.rank, device=topology.device)

    def complete(self) -> Ending:
        """Steps to the end, to `training.stop_after_steps`, or until asked to stop; says which it was."""
        self._resume()
        self._tell_finished_step()
        last_step = min(self.config.training.num_steps, self.config.training.stop_after_steps or 2**62)
        ending = Ending("finished" if last_step == self.config.training.num_steps else "stop_after_steps")
        if self.progress.step >= last_step and (RunFiles(self.config).directory / "summary.json").exists():
            self.console.say(f"finished already, at step {self.progress.step}; nothing to do")
            return ending
        if self.files is not None:
            self.files.open(
                self.config, self._provenance(), resumed_step=self.progress.step, branch=self.branch
            )
        self.stop.arm(speaks=self.topology.is_first)
        try:
            if self.progress.owes_evaluation:
                self._evaluate()
            while self.progress.step < last_step:
                step = self.progress.step + 1
                with self.profiler.step(step), self.health.measured(step):
                    asked = self._step().stop_is_asked
                self.health.check_replicas(self.engine, step)
                if asked and self.progress.step < last_step:
                    ending = self._stop()
                    break
                if self._is_due(self.config.evaluation.interval):
                    self._evaluate()
                self.saver.finish_if_written()
                if self.config.checkpoint.is_due(self.progress.step):
                    self._save()
            self._finish(ending)
        finally:
            self.console.close()
            if self.files is not None:
                self.files.close()
        return ending

    def _stop(self) -> Ending:
        """Agrees on the reason, the first rank's that has one; time is short, so an evaluation waits."""
        reasons = [reason for reason in gather_from_ranks(self.stop.reason) if reason is not None]
        ending = Ending(reasons[0], goes_on=True)
        self.console.say(f"stopping after step {self.progress.step}: {ending.reason}")
        self.progress.owes_evaluation = self._is_due(self.config.evaluation.interval)
        self.held_out = None
        return ending

    def _find_checkpoint(self) -> Checkpoint | None:
        if self.config.checkpoint.resume:
            newest = find_newest_complete(RunFiles.checkpoints(self.config), say=self.console.say)
            if newest is not None:
                return newest
        self.branch = on_first_rank(lambda: find_branch(self.config))
        return None if self.branch is None else open_checkpoint(self.branch.checkpoint)

    def _find_initial_weights(self) -> WeightsSource | None:
        path = self.config.checkpoint.initial_weights
        if path is None or self.resumed_from is not None:
            return None
        return on_first_rank(lambda: find_weights(Path(path), self.config))

    def _resume(self) -> None:
        checkpoint = self.resumed_from
        if checkpoint is not None:
            self.engine.restore(checkpoint)
            restore_random_states(checkpoint, self.config, say=self.console.say)
            self.engine.schedule.step(checkpoint.progress["schedule_steps"])
            self.console.say(f"going on from {checkpoint.path} at step {self.progress.step}")

    def _record_health(self, step: int, event: dict[str, Any]) -> None:
        if self.files is not None:
            self.files.record({"kind": "health", "step": step, **event})

    def _step(self) -> StepResult:
        training = self.config.training
        self._synchronize()
        begun = time.perf_counter()
        with self._counted():
            self.last = train_step(
                self.engine,
                self._training_batches(),
                num_microbatches=self._num_microbatches(training.global_batch_size),
                topology=self.topology,
                judge=self.health.watch.judge,
                asks_to_stop=lambda: self.stop.reason is not None,
            )
        self._synchronize()
        seconds = time.perf_counter() - begun
        self.health.take(self.last, self.progress.step + 1)
        self.progress.count_step(training.global_batch_size, seconds)
        self._tell_finished_step()
        self.console.advance(self.progress.step)
        # In place of a step that is not finite there is a health record.
        if self.last.is_finite and (self.progress.step == 1 or self._is_due(self.config.logging.interval)):
            self._log_step(self.last, seconds)
        return self.last

    def _training_batches(self) -> Iterator[Batch]:
        return self._batches(
            self.training_samples,
            first_sample=self.progress.consumed_samples,
            num_samples=self.config.training.global_batch_size,
        )

    def _batches(self, samples: Any, *, first_sample: int, num_samples: int) -> Iterator[Batch]:
        return microbatches(
            samples,
            first_sample=first_sample,
            num_samples=num_samples,
            num_microbatches=self._num_microbatches(num_samples),
            micro_batch_size=self.config.training.micro_batch_size,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            device=self.topology.device,
            context_group=self.topology.context_group,
        )

    def _num_microbatches(self, num_samples: int) -> int:
        """Microbatches in which each data-parallel rank goes over its part of `num_samples`."""
        by_all = self.config.training.micro_batch_size * self.topology.data_size
        turns = self.config.parallel.microbatch_turns
        return math.ceil(num_samples / by_all / turns) * turns

    def _log_step(self, result: StepResult, seconds: float) -> None:
        samples = self.config.training.global_batch_size
        record = {
            "kind": "train",
            **self.meter.position(self.progress),
            "train_loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            "step_seconds": seconds,
            "tokens_per_second": self.meter.tokens_per_second(samples, seconds),
        }
        self.console.step(record, teraflops=self.meter.teraflops_per_rank(samples, seconds))
        if self.files is not None:
            self.files.record(record)

    def _evaluate(self) -> None:
        num_sequences = self.config.evaluation.num_sequences
        batches = self._batches(self.validation_samples, first_sample=0, num_samples=num_sequences)
        held_out = evaluate_held_out(
            functools.partial(
                self.engine.forward, batches=batches, num_microbatches=self._num_microbatches(num_sequences)
            ),
            byte_lengths=self.byte_lengths,
            topology=self.topology,
        )
        self.held_out = held_out
        self.progress.owes_evaluation = False
        best = self.progress.best_validation_loss
        if math.isfinite(held_out.loss):
            self.progress.best_validation_loss = held_out.loss if best is None else min(best, held_out.loss)
        self.console.say(
            f" validation loss at iteration {self.progress.step} | lm loss value: {held_out.loss:.6E} | "
            f"lm loss PPL: {held_out.perplexity:.6E} | bits per byte: {held_out.bits_per_byte:.4f} |"
        )
        if self.files is not None:
            self.files.record(
                {
                    "kind": "validation",
                    **self.meter.position(self.progress),
                    **held_out.results,
                }
            )

    def _sync_files(self) -> None:
        """Brings the records to disk, if the run is still this session's; every rank must call it."""

        def sync() -> None:
            if self.files is not None:
                self.files.check_is_own()
                self.files.sync()

        on_first_rank(sync)

    def _save(self) -> None:
        self._sync_files()
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

    def _finish(self, ending: Ending) -> None:
        if not ending.goes_on and (
            self.held_out is None or not self._is_due(self.config.evaluation.interval)
        ):
            self._evaluate()
        if ending.goes_on or not self.config.checkpoint.is_due(self.progress.step):
            self._save()
        self.saver.finish()
        self._sync_files()
        self.profiler.close()
        wire_bytes = gather_communication_counters(self.ledger) if self.config.logging.wire_ledger else None
        if self.files is not None:
            self.files.write_summary(self._summary(wire_bytes, ending))
            if ending.goes_on:
                self.files.write_stop(ending, step=self.progress.step)
        if ending.goes_on:
            self.stop.leave()

    def _summary(self, wire_bytes: list[dict[str, Any]] | None, ending: Ending) -> dict[str, Any]:
        position = self.meter.position(self.progress)
        held_out = {} if self.held_out is None else self.held_out.results
        return {
            "schema": 1,
            "exit_reason": ending.reason,
            "steps": self.progress.step,
            "tokens": position["consumed_tokens"],
            "training_flops": position["training_flops"],
            "training_flops_per_token": count_training_flops(self.config),
            "parameters": count_parameters(self.config),
            "training_seconds": self.progress.training_seconds,
            # What follows is of the last session, where a run was gone on with.
            "total_seconds": time.perf_counter() - self.started,
            "median_step_seconds": self.progress.median_step_seconds(),
            "peak_memory_bytes": peak_memory_bytes(self.topology.device),
            "final_train_loss": None if self.last is None or not self.last.is_finite else self.last.loss,
            "final_validation_loss": held_out.get("validation_loss"),
            "best_validation_loss": self.progress.best_validation_loss,
            "validation_perplexity": held_out.get("validation_perplexity"),
            "validation_bits_per_byte": held_out.get("validation_bits_per_byte"),
            "world_size": self.topology.world_size,
            "wire_bytes_sent": wire_bytes,
            "health": self.health.summary(),
        }

    def _provenance(self) -> dict[str, Any]:
        return {
            "machine": describe_machine(self.topology.device),
            **describe_software(),
            "world_size": self.topology.world_size,
            "tensor_parallel": self.config.parallel.tensor,
            "context_parallel": self.config.parallel.context,
            "pipeline_parallel": self.config.parallel.pipeline,
            "data_parallel": self.topology.data_size,
            "initial_weights": None if self.begins_with is None else self.begins_with.describe(),
            "branched_from": None if self.branch is None else str(self.branch.checkpoint),
            "corpus": {
                Path(prefix).name: load_manifest(prefix).model_dump(mode="json")
                for prefix in self.config.data.prefixes
            },
        }

    def _tell_finished_step(self) -> None:
        if self.topology.roll_call is not None:
            self.topology.roll_call.finish_step(self.progress.step)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.step % interval == 0

    def _counted(self) -> contextlib.AbstractContextManager[object]:
        return self.ledger if self.config.logging.wire_ledger else contextlib.nullcontext()

    def _synchronize(self) -> None:
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)
