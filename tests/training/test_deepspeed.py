"""DeepSpeed's engine beyond the table of layouts: bfloat16, clipping, offload, whole runs and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.small_data import SmallData
from tests.tolerances import BFLOAT16_LOSS, LOSS_AFTER_FIVE_STEPS
from tests.training.layouts import ATTENTIONS
from tests.training.test_runs import complete, records, summary
from tests.training.training_runs import replicas_that_differ, take_steps

TENSOR_2_DATA_2 = {"tensor": 2, "sequence": True}


def config_of(engine: str, *, clip: float = 1.0, precision: str = "float32", **deepspeed: Any) -> RunConfig:
    return small_config(
        attention=ATTENTIONS["sas-all_to_all"],
        parallel=TENSOR_2_DATA_2,
        optimizer={"learning_rate": 0.01, "clip_gradient_norm": clip},
        schedule={"warmup_steps": 2},
        training={
            "num_steps": 9,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "engine": engine,
            "precision": precision,
        },
        **({"deepspeed": deepspeed} if deepspeed else {}),
    )


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_counts_each_parameter_once(ranks: Any, stage: int) -> None:
    # Far below the norm of about 1, so that every step is clipped, and a norm counted twice would show.
    expected = ranks(4).run(take_steps, config_of("megatron", clip=0.05))
    by_rank = ranks(4).run(take_steps, config_of("deepspeed", clip=0.05, zero_stage=stage))
    assert not replicas_that_differ(by_rank)
    for steps, megatron in zip(by_rank, expected, strict=True):
        assert megatron.gradient_norms[0] > 0.2
        assert steps.gradient_norms == pytest.approx(megatron.gradient_norms, rel=1e-4)
        assert steps.losses == pytest.approx(megatron.losses, rel=LOSS_AFTER_FIVE_STEPS)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_as_megatrons_engine_does(ranks: Any, stage: int) -> None:
    expected = ranks(4).run(take_steps, config_of("megatron", precision="bfloat16"))
    by_rank = ranks(4).run(take_steps, config_of("deepspeed", precision="bfloat16", zero_stage=stage))
    assert not replicas_that_differ(by_rank)
    for steps, megatron in zip(by_rank, expected, strict=True):
        assert steps.losses == pytest.approx(megatron.losses, rel=BFLOAT16_LOSS)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_settings_reach_deepspeed_and_change_nothing(ranks: Any, stage: int) -> None:
    settings = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    [plain, *_] = ranks(4).run(take_steps, config_of("deepspeed", zero_stage=stage))
    [offloaded, *_] = ranks(4).run(take_steps, config_of("deepspeed", zero_stage=stage, settings=settings))
    assert offloaded.losses == pytest.approx(plain.losses, rel=LOSS_AFTER_FIVE_STEPS)
    by_rank = ranks(4).run(zero_settings, config_of("deepspeed", zero_stage=stage, settings=settings))
    assert by_rank == [(stage, "cpu")] * 4


def zero_settings(config: RunConfig) -> tuple[int, str]:
    """On a rank: the stage and offload device that DeepSpeed says it runs with."""
    from sas_megatron.training.engine import assemble
    from tests.rank_pool import in_layout

    in_layout(config.parallel)
    engine: Any = assemble(config)
    return engine.engine.zero_optimization_stage(), engine.engine.zero_offload_optimizer().device


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32")]
)
def test_a_run_goes_on_bit_for_bit(
    ranks: Any, small_data: SmallData, tmp_path: Path, stage: int, precision: str
) -> None:
    def run(name: str, **more: dict[str, Any]) -> RunConfig:
        training = {"num_steps": 8, "precision": precision, "engine": "deepspeed", **more.pop("training", {})}
        return small_data.run(
            tmp_path / name,
            parallel={"tensor": 2, "sequence": True},
            model={"hidden_dropout": 0.1},
            deepspeed={"zero_stage": stage},
            training=training,
            evaluation={"interval": 4},
            **more,
        )

    whole = run("whole")
    ranks(4).run(complete, whole)
    ranks(4).run(complete, run("parts", training={"stop_after_steps": 4}))
    rest = run("parts", checkpoint={"resume": True})
    ranks(4).run(complete, rest)
    timeless = ("step", "consumed_samples", "train_loss", "gradient_norm", "learning_rate")
    assert [[record[key] for key in timeless] for record in records(rest)] == [
        [record[key] for key in timeless] for record in records(whole)
    ]
    assert len(records(whole)) == 8
    assert summary(rest)["final_validation_loss"] == summary(whole)["final_validation_loss"]
