"""Damaged inputs are accepted or refused with one message, and the fuzzer reports each kind of failure."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from sas_megatron.config.errors import UserError
from tests.conftest import ROOT
from tests.fuzz import FuzzFailure, fuzz
from tests.fuzzing.child import MAX_MEMORY_BYTES, Seeds, Target
from tests.fuzzing.inputs import Input
from tests.fuzzing.strategies import TARGETS, FuzzTarget
from tests.selection import draws, exhaustive


@draws(200, 10_000)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.timeout(3600)
def test_damaged_input_is_accepted_or_refused_with_one_message(name: str, num_draws: int) -> None:
    counts = fuzz(TARGETS[name], num_inputs=num_draws)
    assert counts["accepted"] + counts["refused"] >= num_draws
    assert counts["refused"] > 0.2 * num_draws


def build_number() -> Seeds:
    return {"seed": {"number": b"0"}}


def read_number() -> int:
    number = int(Path("number").read_bytes())
    if number == 1:
        raise UserError("number=1: is not allowed; use 0")
    return number


def run_correct(_arguments: tuple[str, ...]) -> None:
    read_number()


def run_raising(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        raise KeyError("the planted fault")


def run_crashing(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        ctypes.string_at(0)


def run_hanging(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        time.sleep(60)


def run_exhausting_memory(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        bytearray(2 * MAX_MEMORY_BYTES)


def run_exiting(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        os._exit(0)


def run_failing(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        sys.exit(1)


def run_with_two_messages(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        print("sas-megatron: error: one\nsas-megatron: error: two", file=sys.stderr)
        sys.exit(2)


def run_with_traceback(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        raise UserError("file: cannot be read (Traceback (most recent call last): …); copy it again")


def run_printing_surrogates(_arguments: tuple[str, ...]) -> None:
    if read_number() > 7:
        print("\udcff")


FAULTS: dict[str, tuple[Callable[[tuple[str, ...]], None], str]] = {
    "exception": (run_raising, "KeyError"),
    "crash": (run_crashing, "crash: the process ended with SIGSEGV"),
    "hang": (run_hanging, "hang: ran for more than 0.5 s"),
    "memory": (run_exhausting_memory, "MemoryError"),
    "end of the process": (run_exiting, "crash: the process ended with exit status 0"),
    "exit status": (run_failing, "exit status 1"),
    "two messages": (run_with_two_messages, "not one message"),
    "traceback in a message": (run_with_traceback, "not a readable message"),
    "text that stdout cannot represent": (run_printing_surrogates, "UnicodeEncodeError"),
}


def numbers(_seeds: Seeds) -> st.SearchStrategy[Input]:
    return st.integers(0, 15).map(lambda number: Input("seed", {"number": b"%d" % number}))


def fuzz_numbers(run: Callable[[tuple[str, ...]], None]) -> dict[str, int]:
    target = FuzzTarget(Target(build_number, run), numbers)
    return dict(fuzz(target, num_inputs=60, max_seconds=0.5 if run is run_hanging else 10))


def test_a_correct_target_is_tried_on_every_input() -> None:
    assert fuzz_numbers(run_correct) == {"accepted": 15, "refused": 1}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_failure_is_reported_with_the_smallest_input(fault: str) -> None:
    run, description = FAULTS[fault]
    with pytest.raises(FuzzFailure) as caught:
        fuzz_numbers(run)
    assert str(caught.value).startswith(description)
    assert "number = b'8'" in str(caught.value)


def test_the_command_fuzzes_one_target_and_refuses_unknown_ones() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "tokenizers", "nothing", "--inputs", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no target nothing; use configs, studies" in done.stderr


@exhaustive
def test_the_command_prints_the_number_of_accepted_and_refused_inputs() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "tokenizers", "--inputs", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("tokenizers: ")
