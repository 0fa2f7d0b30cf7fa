"""Fork the processes of `planning.rank_processes`, for tests that do not concern how they start."""

from __future__ import annotations

import multiprocessing

import pytest

from tests.fork_server import fork_context


def fork_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of `run_on_ranks` from the fork server until the end of the test."""
    context = fork_context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
