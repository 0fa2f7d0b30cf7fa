"""Errors of all sections except attention: each message has field, value, rule and remedy."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from tests.run_configs import small_config

LLAMA3 = {
    "rotary_scaling": "llama3",
    "rotary_scaling_factor": 8.0,
    "rotary_low_frequency_factor": 1.0,
    "rotary_high_frequency_factor": 4.0,
    "rotary_original_length": 8192,
}
# Sections that break one rule each -> the full message.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "sequence parallelism on one tensor rank": (
        {"parallel": {"sequence": True}},
        "parallel.sequence=True: sequence parallelism shards over the tensor group, which has only one rank; "
        "set parallel.tensor to 2 or more, or parallel.sequence=false",
    ),
    "sequence length over tensor ranks": (
        {"parallel": {"tensor": 2, "sequence": True}, "data": {"sequence_length": 13}},
        "data.sequence_length=13: must be divisible by parallel.tensor=2 under sequence parallelism; "
        "use a multiple of 2, or set parallel.sequence=false",
    ),
    "MLP over tensor ranks": (
        {"parallel": {"tensor": 2}, "model": {"ffn_hidden_size": 27}},
        "model.ffn_hidden_size=27: must be divisible by parallel.tensor=2; use a multiple of 2",
    ),
    "embedding table over tensor ranks": (
        {"parallel": {"tensor": 2}, "model": {"vocab_multiple": 5}},
        "model.vocab_multiple=5: must be divisible by parallel.tensor=2; use a multiple of 2",
    ),
    "rotary scaling without its factor": (
        {"model": {"rotary_scaling": "linear"}},
        "model.rotary_scaling_factor=None: is required by model.rotary_scaling=linear; use 8.0",
    ),
    "factor without rotary scaling": (
        {"model": {"rotary_scaling_factor": 8.0}},
        "model.rotary_scaling_factor=8.0: has no effect with model.rotary_scaling=none; "
        "omit it, or set model.rotary_scaling=llama3",
    ),
    "rotary scaling that shortens sequences": (
        {"model": {"rotary_scaling": "linear", "rotary_scaling_factor": 0.5}},
        "model.rotary_scaling_factor=0.5: must be at least 1, since frequencies are divided by it; use 1.0",
    ),
    "rotary scaling in the wrong order": (
        {"model": {**LLAMA3, "rotary_low_frequency_factor": 4.0}},
        "model.rotary_high_frequency_factor=4.0: must be above model.rotary_low_frequency_factor=4.0; "
        "use 16.0",
    ),
    "rotary scaling of no sequence": (
        {"model": {**LLAMA3, "rotary_original_length": 0}},
        "model.rotary_original_length=0: must be positive; use 1 or more",
    ),
    "batch sizes": (
        {"training": {"global_batch_size": 8, "micro_batch_size": 3}},
        "training.global_batch_size=8: must be a multiple of training.micro_batch_size=3; use 9",
    ),
    "warm-up not shorter than the run": (
        {"schedule": {"warmup_steps": 9}},
        "schedule.warmup_steps=9: must be below training.num_steps=9; shorten it or train longer",
    ),
    "decay that overlaps warm-up": (
        {"schedule": {"kind": "warmup_stable_decay", "warmup_steps": 4, "decay_steps": 6}},
        "schedule.decay_steps=6: must not exceed the 5 of training.num_steps=9 that remain after "
        "schedule.warmup_steps=4; shorten one of them or train longer",
    ),
    "decay steps of another schedule": (
        {"schedule": {"decay_steps": 3}},
        "schedule.decay_steps=3: must be set if and only if schedule.kind=warmup_stable_decay; "
        "set both or neither",
    ),
    "unknown choice": (
        {"schedule": {"kind": "cosin"}},
        "schedule.kind='cosin': is not one of the choices; "
        "use 'cosine', 'linear', 'constant' or 'warmup_stable_decay'",
    ),
    "final fraction": (
        {"schedule": {"final_fraction": 1.5}},
        "schedule.final_fraction=1.5: must be between 0 and 1; use 0.1, for example",
    ),
    "zero learning rate": (
        {"optimizer": {"learning_rate": 0.0}},
        "optimizer.learning_rate=0.0: must be positive; use more than 0",
    ),
    "learning rate that is not a number": (
        {"optimizer": {"learning_rate": float("nan")}},
        "optimizer.learning_rate=nan: must be a finite number; write a number, such as 0.1",
    ),
    "no token files": (
        {"data": {"prefixes": []}},
        "data.prefixes=[]: names no token file; give at least one",
    ),
    "more weights than prefixes": (
        {"data": {"weights": [0.5, 0.5]}},
        "data.weights=[0.5, 0.5]: has 2 entries for 1 prefixes; give one weight for each prefix",
    ),
    "zero weight": (
        {"data": {"weights": [0.0]}},
        "data.weights=[0.0]: must be positive; remove the prefixes that should not be sampled",
    ),
    "profile with one step number": (
        {"logging": {"profile_steps": [3]}},
        "logging.profile_steps=[3]: must be two step numbers, counted from 1, the first not after the last; "
        "use [10, 12] for three steps, or null for none",
    ),
    "profile that ends before it begins": (
        {"logging": {"profile_steps": [5, 3]}},
        "logging.profile_steps=[5, 3]: must be two step numbers, counted from 1, the first not after the "
        "last; use [10, 12] for three steps, or null for none",
    ),
    "profile from step 0": (
        {"logging": {"profile_steps": [0, 3]}},
        "logging.profile_steps=[0, 3]: must be two step numbers, counted from 1, the first not after the "
        "last; use [10, 12] for three steps, or null for none",
    ),
    "profile after the last step": (
        {"logging": {"profile_steps": [10, 12]}},
        "logging.profile_steps=[10, 12]: begins after training.num_steps=9; use steps of the run",
    ),
    "three shares of the split": (
        {"data": {"split": [0.8, 0.1, 0.1]}},
        "data.split=[0.8, 0.1, 0.1]: must be two positive shares, training and validation; "
        "use [0.97, 0.03], for example",
    ),
    "negative seed": (
        {"training": {"seed": -1}},
        "training.seed=-1: must be at least 0 and below 4294967296; use 1234, for example",
    ),
    "seed of more than 32 bits": (
        {"training": {"seed": 2**32}},
        "training.seed=4294967296: must be at least 0 and below 4294967296; use 1234, for example",
    ),
    "number of layers that float64 cannot represent": (
        {"model": {"num_layers": 10**30}},
        f"model.num_layers={10**30}: must be between -2^53 and 2^53 (9007199254740992); use a smaller number",
    ),
    "numbers of a list that float64 cannot represent": (
        {"logging": {"profile_steps": [1, 10**30]}},
        f"logging.profile_steps=[1, {10**30}]: must be between -2^53 and 2^53 (9007199254740992); "
        "use a smaller number",
    ),
    "fraction instead of an integer": (
        {"model": {"num_layers": 2.5}},
        "model.num_layers=2.5: must be a valid integer; write a whole number, such as 4",
    ),
    "text instead of a number": (
        {"optimizer": {"learning_rate": "fast"}},
        "optimizer.learning_rate='fast': must be a valid number; write a number, such as 0.1",
    ),
    "interval of zero steps": (
        {"checkpoint": {"interval": 0}},
        "checkpoint.interval=0: must be positive; use 1 or more",
    ),
    "number instead of a boolean": (
        {"checkpoint": {"resume": 1}},
        "checkpoint.resume=1: is not one of the choices; use true, false or auto",
    ),
    "number instead of text": (
        {"data": {"tokenizer": 7}},
        "data.tokenizer=7: must be a valid string; write text, in quotes if it looks like a number or a date",
    ),
    "text instead of a list": (
        {"data": {"prefixes": "corpus"}},
        "data.prefixes='corpus': must be a valid list; write a list, such as [a, b]",
    ),
    "list instead of a mapping": (
        {"deepspeed": {"settings": []}},
        "deepspeed.settings=[]: must be a valid dictionary; write a mapping, such as {name: value}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_message_names_field_value_rule_and_remedy(case: str) -> None:
    sections, message = BROKEN[case]
    with pytest.raises(UserError) as caught:
        small_config(**sections)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (
            5,
            "world size=5: must be a multiple of 2, the ranks of one model (parallel.tensor=2); "
            "start 2 or 4 or 6 or 12 processes (launch/torchrun.sh 2 CONFIG), or change the parallel degrees",
        ),
        (
            8,
            "training.global_batch_size=12: must be a multiple of micro_batch_size × data-parallel ranks "
            "= 2 × 4; start 2 or 4 or 6 or 12 processes, or change the batch sizes",
        ),
    ],
)
def test_wrong_world_size_names_world_sizes_that_fit(world_size: int, message: str) -> None:
    config = small_config(
        parallel={"tensor": 2}, training={"num_steps": 9, "global_batch_size": 12, "micro_batch_size": 2}
    )
    with pytest.raises(UserError) as caught:
        config.check_world_size(world_size)
    assert str(caught.value) == message
    assert {size: config.check_world_size(size) for size in (2, 4, 6, 12)} == {2: 1, 4: 2, 6: 3, 12: 6}


def test_a_message_about_a_huge_number_lists_small_divisors_at_once() -> None:
    start = time.process_time()
    with pytest.raises(
        UserError, match=r"^attention\.num_kv_heads=3: must divide .*; use one of \[1, 2, 4, 8, "
    ):
        small_config(attention={"kind": "gqa", "num_heads": 2**52, "num_kv_heads": 3, "head_dim": 8})
    assert time.process_time() - start < 5
