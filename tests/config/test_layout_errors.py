"""Errors of parallel layouts; they are found without torch, before any process group exists."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import build_run_config
from tests.conftest import ROOT
from tests.run_configs import small_config, small_tree

MHA: dict[str, Any] = {"kind": "mha", "num_heads": 6, "head_dim": 10}
SAS: dict[str, Any] = {"kind": "sas", "num_heads": 6, "head_dim": 10}
DEEPSPEED: dict[str, Any] = {"engine": "deepspeed"}

# Sections that break one rule each, changing a model of two layers and four heads -> the full message.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "heads over tensor ranks": (
        {"attention": MHA, "parallel": {"tensor": 4}},
        "attention.num_heads=6: must be divisible by parallel.tensor=4, the ranks that share the heads; "
        "set parallel.tensor to one of [1, 2, 3, 6]",
    ),
    "key/value heads over tensor ranks": (
        {
            "attention": {"kind": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": 10},
            "parallel": {"tensor": 3},
        },
        "attention.num_kv_heads=2: must be a multiple or a divisor of parallel.tensor=3; "
        "set parallel.tensor to one of [1, 2, 6]",
    ),
    "columns over tensor ranks": (
        {"attention": {"kind": "mqa", "num_heads": 6, "head_dim": 4}, "parallel": {"tensor": 3}},
        "attention.head_dim=4: gives 32 columns of queries, keys and values, which must be divisible by "
        "parallel.tensor=3 if there are only 1 key/value heads; use a multiple of 3",
    ),
    "first and last of two interleaved stages": (
        {
            "model": {"num_layers": 6},
            "parallel": {
                "pipeline": 2,
                "virtual_pipeline": 2,
                "first_stage_layers": 2,
                "last_stage_layers": 4,
            },
        },
        "parallel.last_stage_layers=4: must not be set for two interleaved stages if "
        "parallel.first_stage_layers is set, a limit of Megatron-core; leave it out: the last stage gets the "
        "remaining layers",
    ),
    "simulated heads over tensor and context ranks": (
        {"attention": {**SAS, "head_expansion": 2}, "parallel": {"tensor": 2, "context": 4}},
        "parallel.context=4: must divide the 6 heads of each of parallel.tensor=2 ranks; "
        "use one of [1, 2, 3, 6]",
    ),
    "sequence over context ranks": (
        {"parallel": {"context": 4}},
        "data.sequence_length=12: must be divisible by 8, twice parallel.context=4; use a multiple of 8",
    ),
    "sequence over tensor and context ranks": (
        {"parallel": {"tensor": 4, "sequence": True, "context": 2}, "attention": {**MHA, "num_heads": 8}},
        "data.sequence_length=12: must be divisible by parallel.tensor=4 × context=2 under sequence "
        "parallelism; use a multiple of 8, or set parallel.sequence=false",
    ),
    "layers over stages": (
        {"model": {"num_layers": 5}, "parallel": {"pipeline": 2}},
        "parallel.pipeline=2: its 2 stages must share 5 of model.num_layers=5 layers evenly, with at least "
        "one each; use another number of stages, or set parallel.first_stage_layers or "
        "parallel.last_stage_layers",
    ),
    "more stages than layers": (
        {"parallel": {"pipeline": 4}},
        "parallel.pipeline=4: its 4 stages must share 2 of model.num_layers=2 layers evenly, with at least "
        "one each; use another number of stages, or set parallel.first_stage_layers or "
        "parallel.last_stage_layers",
    ),
    "layers without a short stage": (
        {"model": {"num_layers": 6}, "parallel": {"pipeline": 3, "first_stage_layers": 1}},
        "parallel.pipeline=3: its 2 stages without first_stage_layers=1 must share 5 of model.num_layers=6 "
        "layers evenly, with at least one each; "
        "use another number of stages, or set parallel.first_stage_layers or parallel.last_stage_layers",
    ),
    "stages whose layers do not add up": (
        {
            "model": {"num_layers": 6},
            "parallel": {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 4},
        },
        "parallel.last_stage_layers=4: must add up to model.num_layers=6 together with "
        "parallel.first_stage_layers=1; leave one of them out",
    ),
    "layers over model chunks": (
        {"model": {"num_layers": 6}, "parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        "parallel.virtual_pipeline=2: must divide the layers of each stage, and one has 3; use one of [1, 3]",
    ),
    "model chunks without pipeline": (
        {"parallel": {"virtual_pipeline": 2}},
        "parallel.virtual_pipeline=2: requires pipeline parallelism, and parallel.pipeline=1; "
        "set parallel.pipeline to 2 or more, or remove parallel.virtual_pipeline",
    ),
    "overlapped gather without overlapped reduction": (
        {"parallel": {"overlap_parameter_gather": True}, "optimizer": {"distributed": True}},
        "parallel.overlap_parameter_gather=True: requires parallel.overlap_gradient_reduce=true, whose "
        "buckets it gathers; set both or neither",
    ),
    "overlapped gather without distributed optimizer": (
        {"parallel": {"overlap_parameter_gather": True, "overlap_gradient_reduce": True}},
        "parallel.overlap_parameter_gather=True: requires the distributed optimizer, and "
        "optimizer.distributed=false; set optimizer.distributed=true, or leave it out",
    ),
    "recomputing a module that the kind does not have": (
        {"training": {"recompute": "selective", "recompute_modules": ["simulation"]}},
        "training.recompute_modules=['simulation']: attention.kind=mha cannot recompute simulation; "
        "use some of ['attention', 'mlp']",
    ),
    "modules under full recomputation": (
        {"training": {"recompute": "full", "recompute_modules": ["mlp"]}},
        "training.recompute_modules=['mlp']: requires training.recompute=selective; "
        "remove it, or set training.recompute=selective",
    ),
    "recomputing more layers than a stage has": (
        {"parallel": {"pipeline": 2}, "training": {"recompute": "full", "recompute_layers": 2}},
        "training.recompute_layers=2: must not exceed the smallest model chunk, which has 1 layers; "
        "use at most 1, or leave it out to recompute all layers",
    ),
    "bfloat16 at stage 0": (
        {"training": {**DEEPSPEED, "precision": "bfloat16"}, "deepspeed": {"zero_stage": 0}},
        "deepspeed.zero_stage=0: DeepSpeed clips gradients and updates weights incorrectly in bfloat16 at "
        "stage 0; use 1, 2 or 3, or training.precision=float32, or training.engine=megatron",
    ),
    "pipeline with DeepSpeed": (
        {"parallel": {"pipeline": 2}, "training": DEEPSPEED},
        "parallel.pipeline=2: requires Megatron-core's pipeline schedules, which training.engine=deepspeed "
        "does not use; set training.engine=megatron, or parallel.pipeline=1",
    ),
    "distributed optimizer with DeepSpeed": (
        {"optimizer": {"distributed": True}, "training": DEEPSPEED},
        "optimizer.distributed=True: requires Megatron-core's engine, and training.engine=deepspeed; "
        "use deepspeed.zero_stage=1, or set training.engine=megatron",
    ),
    "overlap with DeepSpeed": (
        {"parallel": {"overlap_gradient_reduce": True}, "training": DEEPSPEED},
        "parallel.overlap_gradient_reduce=True: requires Megatron-core's engine, and "
        "training.engine=deepspeed; use deepspeed.settings.zero_optimization.overlap_comm, or set "
        "training.engine=megatron",
    ),
    "DeepSpeed section without DeepSpeed": (
        {"deepspeed": {"zero_stage": 2}},
        "training.engine=megatron: does not use the section deepspeed, which is set; "
        "set training.engine=deepspeed, or remove the section",
    ),
    "setting of another field": (
        {"training": DEEPSPEED, "deepspeed": {"settings": {"zero_optimization": {"stage": 3}}}},
        "deepspeed.settings={'zero_optimization': {'stage': 3}}: zero_optimization.stage is set by "
        "deepspeed.zero_stage and must not be repeated here; remove it",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_message_names_field_value_rule_and_remedy(case: str) -> None:
    sections, message = BROKEN[case]
    with pytest.raises(UserError) as caught:
        build_run_config(small_tree(**sections))
    assert str(caught.value) == message


def test_interleaved_stages_require_a_multiple_of_microbatches() -> None:
    config = small_config(
        parallel={"pipeline": 2, "virtual_pipeline": 2},
        model={"num_layers": 4},
        training={"global_batch_size": 6, "micro_batch_size": 2},
    )
    with pytest.raises(UserError) as caught:
        config.check_world_size(2)
    assert str(caught.value) == (
        "parallel.virtual_pipeline=2: interleaved stages process microbatches in groups of "
        "parallel.pipeline=2, and a step has 3 on each data-parallel rank; "
        "change the batch sizes, or set parallel.virtual_pipeline=1"
    )


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [
        ({"pipeline": 3}, [2, 2, 2]),
        ({"pipeline": 3, "first_stage_layers": 2, "last_stage_layers": 1}, [2, 3, 1]),
        ({"pipeline": 2, "last_stage_layers": 1}, [5, 1]),
        ({"pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 2}, [4, 2]),
        ({}, [6]),
    ],
)
def test_stages_get_the_stated_numbers_of_layers(parallel: dict[str, int], layers: list[int]) -> None:
    config = small_config(model={"num_layers": 6}, parallel=parallel)
    assert config.parallel.layers_of_stages(6) == layers


def test_layout_checks_do_not_import_torch() -> None:
    code = (
        "import sys; from tests.run_configs import small_config\n"
        "small_config(parallel={'pipeline': 2}).check_world_size(2); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
