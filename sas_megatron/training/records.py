"""Writes the records of a run on rank 0: objects in metrics.jsonl, lines on the console, summary.json.

The console shows a progress bar on a terminal, and Megatron's log lines elsewhere.

A record has a `kind`: `train` for a logged step, `validation` for an evaluation, `update` and `probe` for
what `run_probe` measures by layer, `health` for an event that `health_monitor` describes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.data.epochs import DataUse, count_data_use
from sas_megatron.distributed.object_collectives import run_on_rank0
from sas_megatron.distributed.topology import Topology
from sas_megatron.evaluation.held_out import HeldOutLoss
from sas_megatron.platform.device import peak_memory_bytes
from sas_megatron.tracking.follower import Follower
from sas_megatron.training.metrics import Progress, Throughput
from sas_megatron.training.run_files import RunFiles
from sas_megatron.training.starting_point import StartingPoint
from sas_megatron.training.step import StepResult
from sas_megatron.training.summary import SessionResults, build_summary, describe_provenance


class Console:
    """Prints log lines, each with a timestamp, on rank 0; prints nothing on the other ranks."""

    def __init__(self, config: RunConfig, *, is_rank0: bool) -> None:
        self._is_rank0 = is_rank0
        self._bar: Any = None
        self._task: Any = None
        if is_rank0 and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("training", total=config.training.num_steps)
            self._bar.start()

    def log(self, text: str) -> None:
        """Print one line, above the progress bar if one is shown."""
        line = f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}"
        with self._tolerating_closed_output():
            if self._bar is not None:
                self._bar.console.print(line, highlight=False, markup=False)
            elif self._is_rank0:
                print(line, flush=True)

    def log_step(self, text: str, *, loss: float) -> None:
        """Print the line of a step; on a terminal, show only the loss, in the progress bar."""
        if self._bar is None:
            self.log(text)
        else:
            with self._tolerating_closed_output():
                self._bar.update(self._task, description=f"loss {loss:.3f}")

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`, if one is shown."""
        if self._bar is not None:
            with self._tolerating_closed_output():
                self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Remove the progress bar, if one is shown."""
        if self._bar is not None:
            with self._tolerating_closed_output():
                self._bar.stop()

    @contextlib.contextmanager
    def _tolerating_closed_output(self) -> Iterator[None]:
        """Stop printing if the terminal or pipe has closed; the run continues to write its files."""
        try:
            yield
        except OSError:
            self._bar = None
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process


class Recorder:
    """Writes the records of a run on rank 0; does nothing on the other ranks.

    Args:
        config: The run.
        topology: This rank's position in the run.
        peak_flops: Peak FLOP/s of one rank's device; None if unknown, and no MFU is logged then.
    """

    def __init__(self, config: RunConfig, topology: Topology, *, peak_flops: float | None = None) -> None:
        self.throughput = Throughput(config, world_size=topology.world_size, peak_flops=peak_flops)
        self.console = Console(config, is_rank0=topology.is_rank0)
        self._files = RunFiles(config) if topology.is_rank0 else None
        self._follower = Follower(config)
        self._data_use: DataUse | None = None
        self._config = config
        self._topology = topology

    def open(self, start: StartingPoint, *, resumed_step: int) -> None:
        """Create the run directory, or reopen it and drop the records after `resumed_step`; log its repairs.

        Logs how many times the run reads its data.

        Raises:
            FileProblem: The files cannot be written, or the token files cannot be read.
        """
        if self._files is not None:
            self._data_use = count_data_use(self._config)
            for line in self._data_use.describe():
                self.log(line)
            provenance = describe_provenance(self._config, self._topology, start, self._data_use)
            for line in self._files.open(
                self._config, provenance, resumed_step=resumed_step, branch=start.branch
            ):
                self.log(line)
            for line in self._follower.start():
                self.log(line)

    def log(self, text: str) -> None:
        """Print one line."""
        self.console.log(text)

    def log_step(self, progress: Progress, result: StepResult, seconds: float) -> None:
        """Record a finished step with a finite loss."""
        samples = self._config.training.global_batch_size
        record = {
            "kind": "train",
            **self.throughput.position(progress),
            "train_loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            "step_seconds": seconds,
            "tokens_per_second": self.throughput.tokens_per_second(samples, seconds),
        }
        self.console.log_step(self._format_step(record), loss=result.loss)
        self._write(record)

    def log_validation(self, progress: Progress, held_out: HeldOutLoss) -> None:
        """Record an evaluation."""
        self.log(
            f"validation loss at iteration {progress.step} | lm loss value: {held_out.loss:.6E} | "
            f"lm loss PPL: {held_out.perplexity:.6E} | bits per byte: {held_out.bits_per_byte:.4f} |"
            + "".join(f" {name}: {found.loss:.6E} |" for name, found in held_out.sets.items())
        )
        self._write({"kind": "validation", **self.throughput.position(progress), **held_out.results})

    def log_probe(self, kind: str, progress: Progress, layers: list[dict[str, Any]]) -> None:
        """Record measurements by layer, of the kind `update` or `probe`, without a line on the console."""
        self._write({"kind": kind, **self.throughput.position(progress), "layers": layers})

    def log_health(self, step: int, event: dict[str, Any]) -> None:
        """Record an event of the run's health, without a line on the console."""
        self._write({"kind": "health", "step": step, **event})

    def sync(self) -> None:
        """Sync the records to disk, if this session still owns the run directory; every rank must call it.

        Raises:
            FileProblem: Another session of the run has started since, or the files cannot be written.
        """

        def check_and_sync() -> None:
            if self._files is not None:
                self._files.check_session()
                self._files.sync()

        run_on_rank0(check_and_sync)

    def write_summary(self, progress: Progress, results: SessionResults) -> None:
        """Write summary.json, and stopped.json if the run can be resumed.

        Raises:
            FileProblem: The files cannot be written.
        """
        if self._files is not None:
            assert self._data_use is not None, "call open() first"
            self._files.write_summary(
                build_summary(self._config, self._topology, progress, results, data_use=self._data_use)
            )
            if results.run_exit.is_resumable:
                self._files.write_stop(results.run_exit, step=progress.step)

    def close(self) -> None:
        """Close the console and the files, and report the trackers that lack records."""
        self.console.close()
        if self._files is not None:
            self._files.close()
        for line in self._follower.finish():
            self.log(line)

    def _write(self, record: dict[str, Any]) -> None:
        if self._files is not None:
            self._files.write_record(record)

    def _format_step(self, record: dict[str, Any]) -> str:
        """Return the line of a step in the form of Megatron's `training_log`."""
        training, seconds = self._config.training, record["step_seconds"]
        teraflops = self.throughput.teraflops_per_rank(training.global_batch_size, seconds)
        utilization = self.throughput.utilization(training.global_batch_size, seconds)
        memory = peak_memory_bytes(self._topology.device) / 2**30
        mfu = "" if utilization is None else f"MFU: {utilization:.1%} | "
        return (
            f"iteration {record['step']:8d}/{training.num_steps:8d} | "
            f"consumed samples: {record['consumed_samples']:12d} | "
            f"elapsed time per iteration (ms): {seconds * 1000:.1f} | "
            f"throughput per GPU (TFLOP/s/GPU, model FLOPs, full attention matrix): {teraflops:.3f} | "
            f"{mfu}peak memory of rank 0 (GiB): {memory:.2f} | "
            f"learning rate: {record['learning_rate']:.6E} | "
            f"global batch size: {training.global_batch_size:5d} | "
            f"lm loss: {record['train_loss']:.6E} | grad norm: {record['gradient_norm']:.3f} |"
        )
