"""What a run says while it goes: a progress bar on a terminal, Megatron's familiar lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from sas_megatron.config.run import RunConfig


class Console:
    """Speaks on rank 0; the others are given one that is silent."""

    def __init__(self, config: RunConfig, *, speaks: bool) -> None:
        self._speaks = speaks
        self._total = config.training.num_steps
        self._samples = config.training.global_batch_size
        self._bar: Any = None
        self._task: Any = None
        if speaks and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("training", total=self._total)
            self._bar.start()

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._speaks:
            print(text, flush=True)

    def step(self, record: dict[str, Any], *, teraflops: float) -> None:
        """A logged step."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"loss {record['train_loss']:.3f}")
            return
        self.say(
            f" iteration {record['step']:8d}/{self._total:8d} | "
            f"consumed samples: {record['consumed_samples']:12d} | "
            f"elapsed time per iteration (ms): {record['step_seconds'] * 1000:.1f} | "
            f"throughput per GPU (TFLOP/s/GPU): {teraflops:.3f} | "
            f"learning rate: {record['learning_rate']:.6E} | global batch size: {self._samples:5d} | "
            f"lm loss: {record['train_loss']:.6E} | grad norm: {record['gradient_norm']:.3f} |"
        )

    def advance(self, step: int) -> None:
        """Moves the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Ends the bar, where there is one."""
        if self._bar is not None:
            self._bar.stop()
