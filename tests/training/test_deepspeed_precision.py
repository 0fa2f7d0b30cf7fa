"""DeepSpeed accumulates and reduces the gradients of bfloat16 weights in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases

NUM_MICROBATCHES = 8
# bfloat16 has 8 significant bits: 1 + 2^-9 is 1.
LARGE, SMALL = 1.0, 2.0**-9


def bfloat16_config(stage: int, **settings: Any) -> RunConfig:
    return small_config(
        training={
            "num_steps": 2,
            "global_batch_size": 2 * NUM_MICROBATCHES,
            "micro_batch_size": 1,
            "engine": "deepspeed",
            "precision": "bfloat16",
        },
        optimizer={"learning_rate": 1.0, "clip_gradient_norm": 0.0},
        deepspeed={"zero_stage": stage, "settings": settings},
    )


class WeightedSum(torch.nn.Module):
    """A loss whose gradient with respect to each weight is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))

    def forward(self, gradient: float) -> torch.Tensor:
        return (self.weight * gradient).sum()


def update_by_gradients(config: RunConfig, gradients: list[list[float]]) -> tuple[list[float], str]:
    """Apply, on a rank, one SGD step of learning rate 1 to zero weights, and return the float32 weights."""
    from sas_megatron.training.deepspeed_engine import (
        ModelParallelUnit,
        _import_deepspeed,
        deepspeed_settings,
    )

    topology = in_layout(config.parallel)
    deepspeed = _import_deepspeed()
    model = WeightedSum()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config=deepspeed_settings(config, num_microbatches=NUM_MICROBATCHES),
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    for gradient in gradients[topology.data_rank]:
        engine.backward(engine(gradient))
        engine.step()
    weights = deepspeed.utils.safe_get_full_fp32_param(model.weight)
    return weights.tolist(), str(engine.communication_data_type)


@pytest.mark.parametrize("stage", cases([1, 2, 3], default=[1, 3]))
@pytest.mark.parametrize(
    "gradients",
    [
        pytest.param([[LARGE] + [SMALL] * (NUM_MICROBATCHES - 1)] * 2, id="over microbatches"),
        pytest.param([[LARGE] * NUM_MICROBATCHES, [SMALL] * NUM_MICROBATCHES], id="over ranks"),
    ],
)
def test_small_gradients_are_not_lost_beside_large_ones(
    ranks: Any, stage: int, gradients: list[list[float]]
) -> None:
    mean = sum(sum(of_rank) for of_rank in gradients) / (2 * NUM_MICROBATCHES)
    for weights, data_type in ranks(2).run(update_by_gradients, bfloat16_config(stage), gradients):
        assert weights == [-mean] * 8
        assert data_type == "torch.float32"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
    ],
)
def test_other_types_of_gradients_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(FieldError, match=f"{key} is set by training.precision"):
        bfloat16_config(1, **settings)
