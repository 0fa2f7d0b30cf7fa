"""The step benchmark compares times with FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.benchmarks.step_comparison import compare_steps, with_microbatches
from sas_megatron.benchmarks.transformers_step import TransformersStep, build_model
from sas_megatron.config.errors import UserError
from sas_megatron.costs.flops import causal_half, count_training_flops
from sas_megatron.costs.parameters import count_parameters
from tests import small_attentions as small
from tests.benchmarks.small_ceilings import shrink_ceilings
from tests.planning.forked_ranks import fork_ranks
from tests.run_configs import small_config

NEOX = {"linear_bias": True, "normalization": "layernorm", "activation": "gelu", "parallel_residual": True}


def test_times_are_compared_with_flops_and_with_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
    shrink_ceilings(monkeypatch)
    configs = {
        name: with_microbatches(small_config(attention=attention), 3)
        for name, attention in (("mha", small.MHA), ("sas", small.SAS))
    }
    result = compare_steps(configs, device=torch.device("cpu"), rounds=2)
    assert result["time_over_flops"] == pytest.approx(result["time_ratio"] / result["flops_ratio"])
    for name, config in configs.items():
        row = result["rows"][name]
        assert row["tokens"] == 3 * 2 * 12
        assert row["parameters"] == sum(count_parameters(config).values())
        terms = count_training_flops(config)
        assert row["flops"] == row["tokens"] * sum(terms.values())
        at_peak = row["flops"] / result["peak_flops_per_second"]
        assert row["flops_utilization"] == pytest.approx(at_peak / row["seconds"])
        halved = sum(causal_half(terms, sequence_length=12).values())
        assert row["flops_utilization_causal"] / row["flops_utilization"] == pytest.approx(
            halved / sum(terms.values())
        )
    assert result["flops_ratio"] == result["rows"]["sas"]["flops"] / result["rows"]["mha"]["flops"]


@pytest.mark.parametrize(
    ("attention", "model"),
    [
        (small.GQA, {}),
        ({**small.GQA, "qkv_bias": True}, {"tie_embeddings": True}),
        ({**small.MHA, "head_dim": 5, "rotary_dim": 4}, NEOX),
    ],
    ids=["llama", "qwen2", "neox"],
)
def test_the_model_of_transformers_has_the_parameters_of_the_run(
    attention: dict[str, Any], model: dict[str, Any]
) -> None:
    config = small_config(attention=attention, model=model)
    built = build_model(config)
    assert sum(weight.numel() for weight in built.parameters()) == sum(count_parameters(config).values())


def test_a_step_of_transformers_trains_its_model() -> None:
    config = small_config(optimizer={"learning_rate": 0.05})
    step = TransformersStep(config, torch.device("cpu"))
    batch: Any = {name: torch.arange(24).view(2, 12) for name in ("tokens", "labels")}

    def loss() -> float:
        return float(step.model(input_ids=batch["tokens"], labels=batch["labels"]).loss.detach())

    before = loss()
    for _ in range(5):
        step.run(batch, num_microbatches=2)
    assert loss() < before - 1.0


def test_transformers_is_timed_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
    shrink_ceilings(monkeypatch)
    configs = {"mha": small_config(), "sas": small_config(attention=small.SAS)}
    result = compare_steps(configs, device=torch.device("cpu"), rounds=2, with_transformers=True)
    assert result["transformers_seconds"] > 0
    ratio = result["transformers_seconds"] / result["rows"]["mha"]["seconds"]
    assert 0.2 * ratio < result["transformers_over_base"] < 5 * ratio


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"attention": small.SAS},
            r"^--transformers: no model of transformers has BASE's attention.kind=sas;",
        ),
        ({"parallel": {"tensor": 2}}, r"^--transformers: trains in one process, .* parallel.tensor=2; add"),
        ({"training": {"precision": "bfloat16"}}, r"^--transformers: compares in float32, but BASE has .*;"),
    ],
)
def test_a_base_that_transformers_cannot_train_is_an_error(sections: dict[str, Any], message: str) -> None:
    configs = {"base": small_config(**sections), "other": small_config(**sections)}
    with pytest.raises(UserError, match=message):
        compare_steps(configs, device=torch.device("cpu"), rounds=2, with_transformers=True)
