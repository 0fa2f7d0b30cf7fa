"""Norms of gradients and updates: equal to a float64 computation, in the records, and without effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData
from tests.training.test_runs import complete, records
from tests.training.training_runs import batches_of_step, take_steps

SAS = {**small.SAS_GROUPED, "head_expansion": 2}


def part_of(name: str) -> str:
    """Return the part of a layer that a parameter belongs to."""
    if ".mlp." in name or ".pre_mlp_layernorm." in name:
        return "mlp"
    return "simulation" if ".simulation." in name else "attention"


def norms_in_float64(config: RunConfig) -> list[dict[str, Any]]:
    """Compute the gradient of the mean loss and the first update of AdamW, parameter by parameter."""
    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.language_loss import forward_step

    topology = in_layout(config.parallel)
    (model,) = build_gpt_chunks(config, dtype=torch.float64)
    batches = batches_of_step(config, topology, 0)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for _ in range(config.training.num_microbatches(1)):
        losses, total_loss = forward_step(batches, model)
        loss, tokens, _ = total_loss(losses)
        total, count = total + loss, count + float(tokens)
    (total / count).backward()
    named = dict(model.named_parameters())
    settings = config.optimizer
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in named.values()))
    clipping = min(1.0, settings.clip_gradient_norm / norm)
    rate = settings.learning_rate / config.schedule.warmup_steps
    sums: dict[tuple[int, str], list[float]] = {}
    for name, parameter in named.items():
        if not name.startswith("decoder.layers."):
            continue
        gradient, weights = parameter.grad, parameter.detach()
        clipped = clipping * gradient
        update = rate * clipped / (clipped.abs() + settings.epsilon)
        if weights.dim() > 1:
            update = update + rate * settings.weight_decay * weights
        of_part = sums.setdefault((int(name.split(".")[2]) + 1, part_of(name)), [0.0, 0.0, 0.0])
        for index, values in enumerate((gradient, update, weights)):
            of_part[index] += float(values.square().sum())
    layers: list[dict[str, Any]] = []
    for number in range(1, config.model.num_layers + 1):
        parts = {part: found for (layer, part), found in sorted(sums.items()) if layer == number}
        layers.append(
            {
                "layer": number,
                "gradient_norm": {part: math.sqrt(found[0]) for part, found in parts.items()},
                "update_ratio": {part: math.sqrt(found[1] / found[2]) for part, found in parts.items()},
            }
        )
    return layers


@pytest.mark.parametrize("attention", [SAS, small.GQA], ids=lambda fields: fields["kind"])
def test_norms_of_gradients_and_updates_equal_a_computation_in_float64(
    ranks: Any, attention: small.Attention
) -> None:
    config = small_config(
        attention={**attention, "backend": "unfused"},
        data={"sequence_length": 16},
        optimizer={"learning_rate": 0.01, "clip_gradient_norm": 0.5},
        schedule={"warmup_steps": 2},
        training={"global_batch_size": 8},
        evaluation={"num_sequences": 4, "probe_sequences": 1},
    )
    [expected] = ranks(1).run(norms_in_float64, config)
    [steps] = ranks(1).run(take_steps, config)
    assert steps.gradient_norms[0] > 0.5, "the gradients must be clipped"
    for layer, of_definition in zip(steps.update, expected, strict=True):
        assert layer.keys() == of_definition.keys()
        for name, values in of_definition.items():
            assert layer[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("engine", cases(("megatron", "deepspeed"), default=("megatron",)))
def test_measurements_are_recorded_before_each_evaluation_and_change_nothing(
    ranks: Any, small_data: SmallData, tmp_path: Path, engine: str
) -> None:
    configs = [
        small_data.run(
            tmp_path / str(number),
            attention=SAS,
            model={"hidden_dropout": 0.1},
            evaluation={"interval": 2, "num_sequences": 4, "probe_sequences": number},
            training={"num_steps": 5, "engine": engine},
            parallel={"tensor": 2},
        )
        for number in (0, 2)
    ]
    for config in configs:
        ranks(2).run(complete, config)
    without, with_probes = (
        [record[f"{kind}_loss"] for kind in ("train", "validation") for record in records(config, kind)]
        for config in configs
    )
    assert with_probes == without
    for kind in ("probe", "update"):
        assert not records(configs[0], kind)
        found = records(configs[1], kind)
        assert [record["step"] for record in found] == [2, 4, 5]
        assert [len(record["layers"]) for record in found] == 3 * [configs[1].model.num_layers]
    first, *_, last = records(configs[1], "update")
    assert first["layers"] != last["layers"]
    assert all(0 < ratio < 1 for ratio in last["layers"][0]["update_ratio"].values())
    probes = records(configs[1], "probe")
    assert probes[0]["layers"] != probes[1]["layers"]
    assert len(probes[0]["layers"][0]["largest_score"]) == 8
