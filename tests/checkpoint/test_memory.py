"""Saving and loading allocate little memory in addition to the saved states."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fork_server import ForkedCommand

# Two tensors of 4 MB, and allocations of Python and the C library.
ALLOWED_BYTES = 16_000_000


def test_saving_and_loading_do_not_copy_all_states(tmp_path: Path) -> None:
    process = ForkedCommand(tmp_path, module="tests.checkpoint.checkpoint_memory")
    try:
        assert process.wait(timeout=200) == 0, process.errors()
    finally:
        process.kill()
    allocated = json.loads(process.output())
    assert allocated["states"] > 190_000_000
    assert allocated["save"] < ALLOWED_BYTES, allocated
    assert allocated["load"] < ALLOWED_BYTES, allocated
    # An asynchronous save copies the states once, so that training can continue.
    assert allocated["states"] * 0.9 < allocated["asynchronous_save"] < allocated["states"] + ALLOWED_BYTES, (
        allocated
    )
