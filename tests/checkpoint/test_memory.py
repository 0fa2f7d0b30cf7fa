"""Saving and loading take little memory beside what they save and load."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fork_server import ForkedCommand

# A tensor of 4 MB or two, and what Python and the C library take for themselves.
SOME_TENSORS_BYTES = 16_000_000


def test_neither_a_save_nor_a_load_holds_the_states_twice(tmp_path: Path) -> None:
    process = ForkedCommand(tmp_path, module="tests.checkpoint.checkpoint_memory")
    try:
        assert process.wait(timeout=200) == 0, process.errors()
    finally:
        process.kill()
    taken = json.loads(process.output())
    assert taken["states"] > 190_000_000
    assert taken["save"] < SOME_TENSORS_BYTES, taken
    assert taken["load"] < SOME_TENSORS_BYTES, taken
    # The one copy that training goes on beside.
    assert taken["states"] * 0.9 < taken["asynchronous_save"] < taken["states"] + SOME_TENSORS_BYTES, taken
