"""The console output of a run: a progress bar on a terminal, and Megatron's log lines elsewhere."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

from sas_megatron.config.run import RunConfig


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
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._is_rank0:
            print(line, flush=True)

    def log_step(self, text: str, *, loss: float) -> None:
        """Print the line of a step; on a terminal, show only the loss, in the progress bar."""
        if self._bar is None:
            self.log(text)
        else:
            self._bar.update(self._task, description=f"loss {loss:.3f}")

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`, if one is shown."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Remove the progress bar, if one is shown."""
        if self._bar is not None:
            self._bar.stop()
