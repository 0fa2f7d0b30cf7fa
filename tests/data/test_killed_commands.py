"""Commands that are killed at random moments and run again write the same files as an undisturbed command."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.data.preparing import files_of
from tests.data.token_pairs import write_pair
from tests.data.tokenizer_kinds import KINDS, WORDS, write_byte_level
from tests.selection import draws, exhaustive

VARYING = ("created",)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sas_megatron", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def run_disturbed(
    arguments: tuple[object, ...], *, seconds: float, num_kills: int, remove_result: Callable[[], None]
) -> None:
    """Kill the command at random moments, start it again after each, and let the last one end.

    Args:
        arguments: The command.
        seconds: How long it takes undisturbed.
        num_kills: Number of commands that are killed while they run.
        remove_result: Called if a command ended before it was killed.
    """
    generator, killed = random.Random(num_kills), 0
    while killed < num_kills:
        process = start(*arguments)
        time.sleep(generator.uniform(0.1, 1.0) * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:
            remove_result()
            seconds *= 0.7
    run_undisturbed(*arguments)


def run_undisturbed(*arguments: object) -> float:
    """Run a command to its end and return its seconds."""
    began = time.monotonic()
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - began


def records_of(folder: Path) -> dict[str, Any]:
    """Return the manifests in a folder, without what differs between runs."""
    return {
        path.name: {
            name: value for name, value in json.loads(path.read_text()).items() if name not in VARYING
        }
        for path in sorted(folder.glob("*.json"))
    }


@draws(2, 10)
@pytest.mark.parametrize(
    "kind",
    [
        "byte-level bpe",
        *(pytest.param(kind, marks=exhaustive) for kind in KINDS if kind != "byte-level bpe"),
    ],
)
def test_a_killed_preparation_loses_and_repeats_nothing(kind: str, num_draws: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer = KINDS[kind](tmp_path / "tokenizer")
    source = tmp_path / "texts.jsonl"
    size = 400 if num_draws == 2 else 6000
    source.write_text(
        "".join(json.dumps({"text": WORDS * 20 + str(number)}) + "\n" for number in range(size))
    )
    arguments = ("data", "prepare", source, "--tokenizer", tokenizer, "--workers", 2, "--output")
    seconds = run_undisturbed(*arguments, tmp_path / "undisturbed" / "tokens")
    run_disturbed(
        (*arguments, tmp_path / "disturbed" / "tokens"),
        seconds=seconds,
        num_kills=num_draws,
        remove_result=lambda: shutil.rmtree(tmp_path / "disturbed"),
    )
    assert files_of(tmp_path / "disturbed") == files_of(tmp_path / "undisturbed")
    assert records_of(tmp_path / "disturbed") == records_of(tmp_path / "undisturbed")
    assert not list((tmp_path / "disturbed").glob("*.partial"))


@draws(2, 10)
def test_a_killed_adoption_loses_and_repeats_nothing(num_draws: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    document = [*tokenizer.encode(WORDS * 50), tokenizer.eos_id]
    for folder in ("undisturbed", "disturbed"):
        (tmp_path / folder).mkdir()
        for number in range(6):
            shard = [*document[number:], document[-1]] if number else document
            write_pair(tmp_path / folder / f"shard_{number}", [shard] * (600 if num_draws == 2 else 4000))
    arguments = ("--tokenizer", tokenizer.location)
    seconds = run_undisturbed("data", "adopt", tmp_path / "undisturbed" / "shard_*", *arguments)
    before = files_of(tmp_path / "disturbed")

    def remove_records() -> None:
        for path in (tmp_path / "disturbed").glob("*.json"):
            path.unlink()

    run_disturbed(
        ("data", "adopt", tmp_path / "disturbed" / "shard_*", *arguments),
        seconds=seconds,
        num_kills=num_draws,
        remove_result=remove_records,
    )
    assert files_of(tmp_path / "disturbed") == before == files_of(tmp_path / "undisturbed")
    assert records_of(tmp_path / "disturbed") == records_of(tmp_path / "undisturbed")
    assert len(records_of(tmp_path / "disturbed")) == 6
    tokens = np.fromfile(tmp_path / "disturbed" / "shard_0.bin", dtype=np.uint16)
    assert records_of(tmp_path / "disturbed")["shard_0.json"]["num_tokens"] == len(tokens)
