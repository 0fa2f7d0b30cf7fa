"""Progress of a preparation: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sas_megatron.data.prepare import PreparationProgress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress() -> Iterator[Callable[[PreparationProgress], None]]:
    """What `prepare_token_files` is to report to; shows it on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LineReporter()
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        started = time.monotonic()

        def report(state: PreparationProgress) -> None:
            progress.update(
                task,
                completed=state.source_bytes_read,
                total=state.source_bytes,
                description=_describe(state, time.monotonic() - started),
            )

        yield report


class _LineReporter:
    """Prints a line when the last is some seconds old, so that logs stay short."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, state: PreparationProgress) -> None:
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            share = 100 * state.source_bytes_read / max(state.source_bytes, 1)
            print(f"{share:.0f}% {_describe(state, now - self._started)}", file=sys.stderr, flush=True)


def _describe(state: PreparationProgress, seconds: float) -> str:
    speed = state.num_tokens / max(seconds, 1e-9)
    return f"{state.num_documents:,} documents, {state.num_tokens:,} tokens, {speed:,.0f} tokens/s"
