"""Harmful steps are skipped on all ranks and counted; spikes are recorded, skipped, or end the run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData
from tests.training.test_runs import complete, records, summary

BAD_STEP = 4
NAN = float("nan")


def complete_disturbed(
    config: RunConfig, disturbed_rank: int, steps: list[int], target: str, factor: float
) -> tuple[list[int], str | None]:
    """Complete a run on this rank; one rank multiplies its samples or gradients in some steps by `factor`.

    Returns:
        A checksum of weights and optimizer state after each step, and the message of the fault that ended
        the run.
    """
    from sas_megatron.training.health import TrainingFault
    from sas_megatron.training.loop import Run

    topology = in_layout(config.parallel, seed=config.training.seed)
    run = Run(config, topology)
    if topology.rank == disturbed_rank:
        _disturb(run, steps, target, factor)
    run_step, states = run._step, []

    def step_and_checksum() -> Any:
        result = run_step()
        states.append(_checksum_state(run.engine))
        return result

    run._step = step_and_checksum  # type: ignore[method-assign]
    try:
        run.complete()
    except TrainingFault as fault:
        return [*states, _checksum_state(run.engine)], str(fault)
    return states, None


def _disturb(run: Any, steps: list[int], target: str, factor: float) -> None:
    training_batches = run.data.training_batches
    *_, parameter = run.engine.model_chunks[-1].parameters()
    if target == "gradients":
        parameter.register_hook(
            lambda gradient: gradient * (factor if run.progress.step + 1 in steps else 1.0)
        )
        return

    def disturbed(first_sample: int) -> Any:
        for index, batch in enumerate(training_batches(first_sample)):
            if run.progress.step + 1 in steps and index == 0:
                batch["loss_mask"] = batch["loss_mask"] * factor
            yield batch

    run.data.training_batches = disturbed


def _checksum_state(engine: Any) -> int:
    from sas_megatron.training.replicas import checksum

    engine.sync_parameters()
    weights = [getattr(p, "ds_tensor", p) for piece in engine.model_chunks for p in piece.parameters()]
    megatron = engine.config.training.engine == "megatron"
    optimizers = engine.optimizers() if megatron else [engine.optimizer]
    moments = [
        value
        for optimizer in optimizers
        for state in (optimizer.optimizer.state if megatron else optimizer.state).values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return hash(tuple(checksum(tensor.reshape(-1)).item() for tensor in (*weights, *moments)))


LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "data 2, distributed optimizer, overlapped, bfloat16": {
        "parallel": {"overlap_gradient_reduce": True, "overlap_parameter_gather": True},
        "optimizer": {"distributed": True},
        "training": {"precision": "bfloat16"},
    },
    "tensor 2": {"parallel": {"tensor": 2, "sequence": True}, "training": {"micro_batch_size": 4}},
    "pipeline 2": {"parallel": {"pipeline": 2}},
    **{
        f"DeepSpeed {stage}": {"training": {"engine": "deepspeed"}, "deepspeed": {"zero_stage": stage}}
        for stage in (0, 1, 2, 3)
    },
    **{
        f"DeepSpeed {stage}, bfloat16": {
            "training": {"engine": "deepspeed", "precision": "bfloat16"},
            "deepspeed": {"zero_stage": stage},
        }
        for stage in (1, 2, 3)
    },
}


def config_of(small_data: SmallData, directory: Path, layout: str, **health: Any) -> RunConfig:
    sections = LAYOUTS[layout]
    training = {"num_steps": 7, "micro_batch_size": 2, **sections.get("training", {})}
    return small_data.run(
        directory, **{**sections, "training": training}, evaluation={"interval": None}, health=health
    )


@pytest.mark.parametrize(
    "layout",
    cases(
        LAYOUTS,
        default=LAYOUTS.keys() - {"data 2", "DeepSpeed 1", "DeepSpeed 2", "DeepSpeed 3, bfloat16"},
    ),
)
def test_a_non_finite_loss_skips_the_step_on_all_ranks(
    ranks: Any, small_data: SmallData, tmp_path: Path, layout: str
) -> None:
    config = config_of(small_data, tmp_path / "run", layout)
    by_rank = ranks(2).run(complete_disturbed, config, 1, [BAD_STEP], "samples", NAN)
    for states, fault in by_rank:
        assert fault is None
        assert states[BAD_STEP - 1] == states[BAD_STEP - 2], "weights and optimizer state stay unchanged"
        assert len(set(states)) == len(states) - 1, "every other step applies its update"
    # Tensor ranks have the same samples, but the test disturbs those of rank 1 only.
    assert records(config, "health") == [
        {
            "kind": "health",
            "step": BAD_STEP,
            "event": "non_finite",
            "quantity": "loss",
            "value": "nan",
            "ranks": [1],
            "response": "skip",
        }
    ]
    train = records(config)
    assert [record["step"] for record in train] == [1, 2, 3, 5, 6, 7]
    assert [record["consumed_samples"] for record in train] == [8, 16, 24, 40, 48, 56]
    # The schedule does not advance in the skipped step: these are the rates of its steps 1 to 6.
    rates = [record["learning_rate"] for record in train]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    counts = summary(config)["health"]
    assert counts["skipped_steps"] == counts["non_finite_losses"] == 1
    assert counts["non_finite_losses_by_rank"] == {"1": 1}


@pytest.mark.parametrize(
    "layout",
    cases(
        ["data 2", "DeepSpeed 0", "DeepSpeed 1", "DeepSpeed 1, bfloat16", "DeepSpeed 3"],
        default=["data 2", "DeepSpeed 1, bfloat16", "DeepSpeed 3"],
    ),
)
def test_non_finite_gradients_skip_the_step_even_if_the_loss_is_finite(
    ranks: Any, small_data: SmallData, tmp_path: Path, layout: str
) -> None:
    config = config_of(small_data, tmp_path / "run", layout)
    for states, _ in ranks(2).run(complete_disturbed, config, 1, [BAD_STEP], "gradients", NAN):
        assert states[BAD_STEP - 1] == states[BAD_STEP - 2]
        assert len(set(states)) == len(states) - 1
    (event,) = records(config, "health")
    assert (event["step"], event["quantity"], event["response"]) == (BAD_STEP, "gradient_norm", "skip")
    assert "ranks" not in event, "the rank is unknown"
    counts = summary(config)["health"]
    assert (counts["non_finite_losses"], counts["non_finite_gradients"]) == (0, 1)


def test_too_many_steps_skipped_in_a_row_end_the_run(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = config_of(small_data, tmp_path / "run", "data 2", skipped_in_a_row=2)
    for states, fault in ranks(2).run(complete_disturbed, config, 1, [1, 2, 4, 5, 6], "samples", NAN):
        assert fault is not None
        assert fault.startswith(
            "step 6 after 2 skipped in a row (health.skipped_in_a_row): "
            "the loss is not finite on rank 1 microbatch 0 (nan)"
        )
        assert len(states) == 6
        assert states[2] == states[-1] != states[1], "the weights are those after step 3"
    events = [(event["step"], event["response"]) for event in records(config, "health")]
    assert events == [(1, "skip"), (2, "skip"), (4, "skip"), (5, "skip"), (6, "stop")]


# No random variation of the norm exceeds this threshold, but a gradient that is multiplied by 1e6 does.
SPIKES = {"spike_window": 4, "spike_threshold": 1000.0}


@pytest.mark.parametrize(
    ("response", "layout"),
    cases(
        itertools.product(["record", "skip"], ["data 2", "DeepSpeed 1", "DeepSpeed 3"]),
        default=[("record", "data 2"), ("skip", "DeepSpeed 1"), ("skip", "DeepSpeed 3")],
    ),
)
def test_a_spike_of_the_gradient_norm_is_recorded_or_skipped(
    ranks: Any, small_data: SmallData, tmp_path: Path, layout: str, response: str
) -> None:
    config = config_of(small_data, tmp_path / "run", layout, spike_response=response, **SPIKES)
    for states, _ in ranks(2).run(complete_disturbed, config, 1, [6], "gradients", 1e6):
        assert (states[5] == states[4]) == (response == "skip")
    (event,) = records(config, "health")
    assert (event["step"], event["event"], event["quantity"]) == (6, "spike", "gradient_norm")
    assert event["response"] == response
    assert event["value"] > event["median"] * 11
    assert event["deviations"] > 1000
    counts = summary(config)["health"]
    assert (counts["gradient_norm_spikes"], counts["skipped_steps"]) == (1, int(response == "skip"))
    assert [record["step"] for record in records(config)] == list(range(1, 8)), (
        "a spike is finite and stays in the records"
    )


def test_a_spike_can_end_the_run_before_its_update(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    config = config_of(small_data, tmp_path / "run", "data 2", spike_response="stop", **SPIKES)
    for states, fault in ranks(2).run(complete_disturbed, config, 1, [6], "gradients", 1e6):
        assert fault is not None
        assert re.match(r"step 6: the gradient norm of \S+ is a spike, \S+ deviations above", fault)
        assert len(states) == 6
        assert states[5] == states[4] != states[3]
    assert [record["step"] for record in records(config)] == [1, 2, 3, 4, 5]


def test_a_resumed_run_keeps_the_health_history(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    def run(**sections: Any) -> RunConfig:
        training = {"num_steps": 7, "micro_batch_size": 2, **sections.pop("training", {})}
        return small_data.run(
            tmp_path / "run",
            training=training,
            evaluation={"interval": None},
            health={"spike_response": "skip", **SPIKES},
            **sections,
        )

    # The second step is skipped, so that the window of four updates is full after the fifth step.
    ranks(2).run(complete_disturbed, run(training={"stop_after_steps": 5}), 1, [2], "samples", NAN)
    resumed = run(checkpoint={"resume": True})
    ranks(2).run(complete_disturbed, resumed, 1, [6], "gradients", 1e6)
    assert [(event["step"], event["event"]) for event in records(resumed, "health")] == [
        (2, "non_finite"),
        (6, "spike"),
    ]
    assert summary(resumed)["health"]["skipped_steps"] == 2


def test_files_contain_valid_json_if_a_loss_is_not_finite(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = config_of(small_data, tmp_path / "run", "data 2")
    ranks(2).run(complete_disturbed, config, 1, [7], "samples", NAN)  # the last step

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "summary.json"):
        text = (tmp_path / "run" / name).read_text()
        for part in text.splitlines() if name == "metrics.jsonl" else [text]:
            json.loads(part, parse_constant=refuse)
    assert summary(config)["final_train_loss"] is None


def test_a_healthy_run_has_no_health_records(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    config = config_of(small_data, tmp_path / "run", "data 2", replica_check_interval=2)
    ranks(2).run(complete, config)
    assert not records(config, "health")
    assert summary(config)["health"]["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("health", "message"),
    [
        ({"spike_window": 2}, r"health\.spike_window=2: must be 3 or more"),
        ({"skipped_in_a_row": -1}, r"health\.skipped_in_a_row=-1: must be at least 0"),
        ({"replica_check_interval": 0}, r"health\.replica_check_interval=0: must be positive"),
    ],
)
def test_invalid_fields_are_refused(health: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        small_config(health=health)


def test_replica_checks_are_refused_at_zero_stage_3() -> None:
    with pytest.raises(FieldError, match=r"health\.replica_check_interval=5: .*deepspeed\.zero_stage=3"):
        small_config(
            health={"replica_check_interval": 5},
            training={"engine": "deepspeed"},
            deepspeed={"zero_stage": 3},
        )
