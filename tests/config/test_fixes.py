"""The overrides of a refused combination make the config valid."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import apply_overrides, build_run_config
from tests.config import test_errors, test_layout_errors, test_section_errors
from tests.run_configs import small_config, small_tree

COMBINATIONS = {
    **test_errors.BROKEN,
    **test_layout_errors.BROKEN,
    **test_section_errors.BROKEN,
    "probe of more windows": ({"evaluation": {"num_sequences": 1, "probe_sequences": 2}}, ""),
    "weights from two places": ({"checkpoint": {"branch_from": "a", "initial_weights": "b"}}, ""),
    "kept steps without a number": ({"checkpoint": {"keep_every": 5}}, ""),
    "replicas of sharded weights": (
        {
            "health": {"replica_check_interval": 5},
            "training": {"engine": "deepspeed"},
            "deepspeed": {"zero_stage": 3},
        },
        "",
    ),
    "cuDNN in float32": (
        {"attention": {"kind": "mha", "num_heads": 4, "head_dim": 8, "backend": "cudnn"}},
        "",
    ),
    "fused kernels of another order": (
        {"attention": {"kind": "sas", "num_heads": 4, "head_dim": 6, "kernel": "fused", "rotary": "before"}},
        "",
    ),
}
# A value that is wrong alone, or which several values could replace.
ALONE = {
    "unknown kind",
    "kind that is not a string",
    "no heads",
    "no rank",
    "no columns",
    "no latent",
    "dropout of everything",
    "final fraction",
    "zero learning rate",
    "no token files",
    "zero weight",
    "profile with one step number",
    "profile that ends before it begins",
    "profile from step 0",
    "three shares of the split",
    "negative seed",
    "seed of more than 32 bits",
    "number of layers that float64 cannot represent",
    "numbers of a list that float64 cannot represent",
    "interval of zero steps",
    "number instead of a boolean",
}


def refuse(tree: dict[str, Any]) -> UserError | None:
    """Return the error of a config; None if it is valid."""
    try:
        build_run_config(tree)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("case", COMBINATIONS)
def test_the_fix_of_a_refused_combination_is_valid(case: str) -> None:
    tree = small_tree(**COMBINATIONS[case][0])
    error = refuse(tree)
    assert error is not None
    if not isinstance(error, FieldError):
        return
    assert bool(error.fix) == (case not in ALONE), error.fix
    for _ in range(2):  # a fix may lead to one other rule
        if isinstance(error, FieldError):
            apply_overrides(tree, list(error.fix))
            error = refuse(tree)
    assert error is None or case in ALONE


def test_interleaved_stages_get_a_fix() -> None:
    config = small_config(
        parallel={"pipeline": 2, "virtual_pipeline": 2},
        model={"num_layers": 4},
        training={"global_batch_size": 6, "micro_batch_size": 2},
    )
    with pytest.raises(FieldError) as caught:
        config.check_world_size(2)
    assert caught.value.fix == ("parallel.virtual_pipeline=1",)
