"""Tests of the comparison of configs."""

from __future__ import annotations

from sas_megatron.config.loading import find_differences
from tests.run_configs import small_config

MHA = small_config()
GQA = small_config(
    attention={"kind": "gqa", "num_heads": 4, "head_dim": 6, "num_kv_heads": 2}, training={"num_steps": 11}
)


def test_fields_that_some_configs_lack_count_as_different() -> None:
    assert find_differences([MHA, GQA, MHA]) == {
        "attention.kind": ("mha", "gqa", "mha"),
        "attention.num_kv_heads": (None, 2, None),
        "training.num_steps": (9, 11, 9),
    }


def test_fields_with_ignored_prefixes_are_left_out() -> None:
    assert set(find_differences([GQA, MHA], ignored=("attention.", "training.num_ordered"))) == {
        "training.num_steps"
    }
    assert not find_differences([MHA, MHA])
