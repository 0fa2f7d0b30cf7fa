"""DeepSpeed's engine: bfloat16, clipping, offload and resume. `layouts` tests it at several layouts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData
from tests.tolerances import BFLOAT16_LOSS, LOSS_AFTER_FIVE_STEPS
from tests.training.layouts import ATTENTIONS
from tests.training.test_runs import complete, records, summary
from tests.training.training_runs import Steps, find_differing_replicas, take_steps

# World size -> layout with two data-parallel replicas of the model.
PARALLEL: dict[int, dict[str, Any]] = {2: {}, 4: {"tensor": 2, "sequence": True}}


def config_of(
    engine: str, *, world_size: int = 4, clip: float = 1.0, precision: str = "float32", **deepspeed: Any
) -> RunConfig:
    return small_config(
        attention=ATTENTIONS["sas-all_to_all"],
        parallel=PARALLEL[world_size],
        optimizer={"learning_rate": 0.01, "clip_gradient_norm": clip},
        schedule={"warmup_steps": 2},
        training={
            "num_steps": 9,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "engine": engine,
            "precision": precision,
        },
        **({"deepspeed": deepspeed} if deepspeed else {}),
    )


@pytest.fixture(scope="module")
def megatron_steps(ranks: Any) -> Any:
    """Return a cached function from world size and fields to the steps with Megatron-core's engine."""

    @functools.cache
    def steps(world_size: int, **fields: Any) -> list[Steps]:
        return ranks(world_size).run(take_steps, config_of("megatron", world_size=world_size, **fields))

    return steps


# In float32, stages 1 and 2 compute the norm in the same code.
@pytest.mark.parametrize(
    ("stage", "precision"),
    cases(
        [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16")],
        default=[(0, "float32"), (3, "float32"), (1, "bfloat16")],
    ),
)
def test_clipping_counts_each_parameter_once(
    ranks: Any, megatron_steps: Any, stage: int, precision: str
) -> None:
    # The norm is about 1, so that every step is clipped and a wrong norm changes the losses.
    expected = megatron_steps(4, clip=0.05, precision=precision)
    config = config_of("deepspeed", clip=0.05, precision=precision, zero_stage=stage)
    by_rank = ranks(4).run(take_steps, config)
    norm_tolerance, loss_tolerance = {
        "float32": (1e-4, LOSS_AFTER_FIVE_STEPS),
        "bfloat16": (BFLOAT16_LOSS, BFLOAT16_LOSS),
    }[precision]
    assert not find_differing_replicas(by_rank)
    for steps, megatron in zip(by_rank, expected, strict=True):
        assert megatron.gradient_norms[0] > 0.2
        assert steps.gradient_norms == pytest.approx(megatron.gradient_norms, rel=norm_tolerance)
        assert steps.losses == pytest.approx(megatron.losses, rel=loss_tolerance)


@pytest.mark.parametrize(("stage", "world_size"), cases([(1, 4), (2, 2), (3, 4)], default=[(2, 2)]))
def test_bfloat16_trains_like_megatrons_engine(
    ranks: Any, megatron_steps: Any, stage: int, world_size: int
) -> None:
    expected = megatron_steps(world_size, precision="bfloat16")
    config = config_of("deepspeed", world_size=world_size, precision="bfloat16", zero_stage=stage)
    by_rank = ranks(world_size).run(take_steps, config)
    assert not find_differing_replicas(by_rank)
    for steps, megatron in zip(by_rank, expected, strict=True):
        assert steps.losses == pytest.approx(megatron.losses, rel=BFLOAT16_LOSS)


@pytest.mark.parametrize(("stage", "world_size"), cases([(1, 2), (2, 4), (3, 4)], default=[(1, 2)]))
def test_offload_settings_reach_deepspeed_and_do_not_change_the_losses(
    ranks: Any, stage: int, world_size: int
) -> None:
    plain = config_of("deepspeed", world_size=world_size, zero_stage=stage)
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    offloaded = config_of("deepspeed", world_size=world_size, zero_stage=stage, settings=offload)
    [expected, *_] = ranks(world_size).run(take_steps, plain)
    by_rank = ranks(world_size).run(steps_and_zero_settings, offloaded)
    assert by_rank[0][0].losses == pytest.approx(expected.losses, rel=LOSS_AFTER_FIVE_STEPS)
    assert [found for _, *found in by_rank] == [[stage, "cpu"]] * world_size


def steps_and_zero_settings(config: RunConfig) -> tuple[Steps, int, str]:
    """Return, on a rank, the steps, and the stage and offload device that DeepSpeed reports."""
    from sas_megatron.training import deepspeed_engine

    engines: list[Any] = []
    initialize = deepspeed_engine.DeepSpeedEngine.__init__

    def initialize_and_keep(engine: Any, *arguments: Any) -> None:
        initialize(engine, *arguments)
        engines.append(engine.engine)

    deepspeed_engine.DeepSpeedEngine.__init__ = initialize_and_keep  # type: ignore[method-assign]
    try:
        steps = take_steps(config)
    finally:
        deepspeed_engine.DeepSpeedEngine.__init__ = initialize  # type: ignore[method-assign]
    (engine,) = engines
    return steps, engine.zero_optimization_stage(), engine.zero_offload_optimizer().device


# The files of a rank contain full optimizer states, shards of them, or shards of states and weights.
@pytest.mark.parametrize(
    ("stage", "precision", "world_size"),
    cases(
        [
            (0, "float32", 4),
            (1, "bfloat16", 4),
            (2, "float32", 4),
            (3, "float32", 2),
            (3, "float32", 4),
        ],
        default=[(1, "bfloat16", 4), (3, "float32", 2)],
    ),
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    ranks: Any, small_data: SmallData, tmp_path: Path, stage: int, precision: str, world_size: int
) -> None:
    def run(name: str, **more: dict[str, Any]) -> RunConfig:
        training = {"num_steps": 5, "precision": precision, "engine": "deepspeed", **more.pop("training", {})}
        return small_data.run(
            tmp_path / name,
            parallel=PARALLEL[world_size],
            model={"hidden_dropout": 0.1},
            deepspeed={"zero_stage": stage},
            training=training,
            evaluation={"interval": 3},
            **more,
        )

    uninterrupted = run("uninterrupted")
    ranks(world_size).run(complete, uninterrupted)
    ranks(world_size).run(complete, run("resumed", training={"stop_after_steps": 3}))
    resumed = run("resumed", checkpoint={"resume": True})
    ranks(world_size).run(complete, resumed)
    compared_keys = ("step", "consumed_samples", "train_loss", "gradient_norm", "learning_rate")
    assert [[record[key] for key in compared_keys] for record in records(resumed)] == [
        [record[key] for key in compared_keys] for record in records(uninterrupted)
    ]
    assert len(records(uninterrupted)) == 5
    assert summary(resumed)["final_validation_loss"] == summary(uninterrupted)["final_validation_loss"]
