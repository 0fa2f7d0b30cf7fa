"""The parent of a fuzz target's child: it waits for results, and finds crashes and hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from pathlib import Path

from tests.fork_server import fork_context
from tests.fuzzing.child import Result, Seeds, Target, serve
from tests.fuzzing.inputs import Input

MAX_SECONDS = 10.0


class WatchedChild:
    """Runs inputs of a target in a child, which is started again after a crash or a hang.

    Args:
        target: The target.
        max_seconds: The time limit of an input.
    """

    def __init__(self, target: Target, *, max_seconds: float = MAX_SECONDS) -> None:
        self._target = target
        self._max_seconds = max_seconds
        in_memory = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(
            prefix="fuzz_", dir=in_memory if os.access(in_memory, os.W_OK) else None
        )
        (Path(self._folder.name) / "log").touch()
        self.seeds: Seeds | None = None
        # The results of the files of each seed as they are.
        self.undamaged: dict[str, Result] = {}
        self._start()

    def run(self, tried: Input) -> Result:
        """Return what becomes of an input.

        An input that exceeds the time limit is tried twice, since the machine may have been busy.
        """
        return (
            self._run(tried)
            or self._run(tried)
            or Result("failed", f"hang: ran for more than {self._max_seconds:g} s\n{self._log()}")
        )

    def close(self) -> None:
        """End the child and remove its files."""
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        context = fork_context()
        self._connection, other_end = context.Pipe()
        self._process = context.Process(
            target=serve, args=(other_end, self._target, self.seeds, self._folder.name)
        )
        self._process.start()
        other_end.close()
        try:
            self.seeds = self._connection.recv()
            self.undamaged = self._connection.recv()
        except EOFError:
            raise AssertionError(f"the target does not start:\n{self._log()}") from None

    def _stop(self) -> None:
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._connection.close()

    def _run(self, tried: Input) -> Result | None:
        """Return the result of an input, or None after the time limit."""
        try:
            self._connection.send(tried)
            if not self._connection.poll(self._max_seconds):
                self._print_stack()
                self._restart()
                return None
            result: Result = self._connection.recv()
            if self._connection.recv():
                self._restart()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode or 0
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            result = Result("failed", f"crash: the process ended with {name}\n{self._log()}")
            self._restart()
        return result

    def _restart(self) -> None:
        self._stop()
        self._start()

    def _print_stack(self) -> None:
        """Let the child print the stack of the hang to its log."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGABRT)
        self._process.join(2)

    def _log(self) -> str:
        return (Path(self._folder.name) / "log").read_text(errors="replace")[-4_000:]
