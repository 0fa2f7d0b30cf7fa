"""The counted FLOPs equal the executed FLOPs, by pass and term: forward, backward, recomputation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given

from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import (
    TRAINING_FACTOR,
    causal_half,
    count_forward_flops,
    count_padding_flops,
    count_recompute_flops,
    count_training_flops,
)
from tests.conftest import ROOT
from tests.model.executed_flops import Flops, executed_flops, simulated_flops_of_stages
from tests.model.small_runs import small_runs, sweep
from tests.run_configs import small_config
from tests.training.layouts import ATTENTIONS


def counted_flops(config: RunConfig) -> Flops:
    """Return the counted FLOPs of one microbatch on a CPU, in the form of `executed_flops`."""
    forward, training = count_forward_flops(config), count_training_flops(config)
    passes = {
        "forward": forward,
        "backward": {term: training[term] - count for term, count in forward.items()},
        "again": count_recompute_flops(config, device="cpu"),
    }
    tokens = config.training.micro_batch_size * config.data.sequence_length
    return {
        name: {term: tokens * count for term, count in terms.items() if count}
        for name, terms in passes.items()
    }


@sweep(60)
@given(config=small_runs())
def test_flops_of_any_config_equal_those_that_run(ranks: Any, config: RunConfig) -> None:
    assert ranks(1).run(executed_flops, config) == [counted_flops(config)]


@pytest.mark.parametrize(
    "name", ["quickstart_sas", "quickstart_gqa", "quickstart_mla", "quickstart_tpa", "quickstart_mfa"]
)
def test_flops_of_a_shipped_config_equal_those_that_run(ranks: Any, name: str) -> None:
    overrides = [
        "parallel.tensor=1",
        "attention.backend=unfused",
        "data.sequence_length=33",
        "model.num_layers=2",
    ]
    config = load_run_config(ROOT / "configs" / f"{name}.yaml", [*overrides, "training.micro_batch_size=1"])
    assert ranks(1).run(executed_flops, config) == [counted_flops(config)]


RECOMPUTATIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "attention": {"recompute": "selective", "recompute_modules": ["attention"]},
    "mlp": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "a layer": {"recompute": "full", "recompute_layers": 1},
    "all": {"recompute": "full"},
}


@pytest.mark.parametrize("recomputed", RECOMPUTATIONS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_fused_attention_runs_the_counted_flops_with_recomputed_scores(
    ranks: Any, name: str, recomputed: str
) -> None:
    """By torch's formulas for the kernels, which have equal widths and recompute the scores."""
    attention = {**ATTENTIONS[name], "backend": "fused"}
    config = small_config(attention=attention, training=RECOMPUTATIONS[recomputed])
    (executed,) = ranks(1).run(executed_flops, config)
    assert _sum_passes(executed.values()) == _sum_passes(
        [
            *counted_flops(config).values(),
            {term: 24 * count for term, count in count_padding_flops(config, device="cpu").items()},
        ]
    )


def _sum_passes(passes: Any) -> dict[str, int]:
    """Sum all passes, and scores and values, which a fused kernel does not distinguish."""
    total: Counter[str] = Counter()
    for terms in passes:
        for term, count in terms.items():
            total["attention" if term in ("scores", "values") else term] += count
    return dict(total)


@pytest.mark.parametrize("name", ["gqa", "sas-gather"])
def test_attention_weights_with_dropout_are_saved_rather_than_recomputed(ranks: Any, name: str) -> None:
    attention = {**ATTENTIONS[name], "backend": "fused", "dropout": 0.1}
    config = small_config(attention=attention)
    (executed,) = ranks(1).run(executed_flops, config)
    padding = {term: 24 * count for term, count in count_padding_flops(config, device="cpu").items()}
    assert "scores" not in count_recompute_flops(config, device="cpu")
    assert count_recompute_flops(config, device="gpu")["scores"] == count_forward_flops(config)["scores"]
    assert _sum_passes(executed.values()) == _sum_passes([*counted_flops(config).values(), padding])


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
    ids=["uneven", "interleaved"],
)
@pytest.mark.parametrize("layers", [None, 1])
def test_the_stages_together_run_the_counted_flops(
    separate_process: Any, parallel: dict[str, int], layers: int | None
) -> None:
    config = small_config(
        attention={**ATTENTIONS["sas-gather"], "backend": "unfused"},
        model={"num_layers": 4},
        parallel=parallel,
        training={"recompute": "full", "recompute_layers": layers},
    )
    stages = separate_process(simulated_flops_of_stages, config)
    for name, counted in counted_flops(config).items():
        assert _sum_passes(stage[name] for stage in stages) == _sum_passes([counted]), name


def test_the_chunked_loss_computes_its_logits_twice(ranks: Any) -> None:
    config = small_config(attention=ATTENTIONS["gqa"], model={"output_loss": "chunked"})
    (executed,) = ranks(1).run(executed_flops, config)
    assert count_recompute_flops(config, device="cpu")["head"] == count_forward_flops(config)["head"]
    head = 24 * count_forward_flops(config)["head"]
    assert executed["forward"]["head"] == head
    assert executed["backward"]["head"] == 3 * head


def test_cudnn_recomputes_scores_and_pads_no_values() -> None:
    fields = {"kind": "sas", "num_heads": 4, "head_dim": 8, "simulated_head_dim": 16, "kernel": "plain"}
    cudnn, fused = (
        small_config(attention={**fields, "backend": backend}, training={"precision": "bfloat16"})
        for backend in ("cudnn", "fused")
    )
    scores = {"scores": count_forward_flops(cudnn)["scores"]}
    assert count_recompute_flops(cudnn, device="gpu") == count_recompute_flops(fused, device="gpu") == scores
    assert count_padding_flops(cudnn, device="gpu") == {}
    assert count_padding_flops(fused, device="gpu").keys() == {"values"}


def test_recomputation_in_fused_kernels_is_counted_but_not_as_model_flops() -> None:
    plain, fused = (
        small_config(
            attention={
                "kind": "sas",
                "num_heads": 4,
                "head_dim": 6,
                "simulated_head_dim": 10,
                "kernel": kernel,
            }
        )
        for kernel in ("plain", "fused")
    )
    assert count_training_flops(fused) == count_training_flops(plain)
    before, after = (count_recompute_flops(config, device="gpu") for config in (plain, fused))
    # The two convolutions from four heads to twelve, with six features and three taps.
    first, second = 2 * 3 * 12 * 4 * 6, 2 * 3 * 12 * 12 * 6
    # Query, key and value repeat the first convolution twice in forward and twice in backward. Query and key
    # repeat both convolutions once more.
    heads = 3 * (2 + 2) * first + 2 * (3 * first + second)
    # The expanded features of query and key, in two kernels.
    features = 2 * 2 * 12 * (2 * 6 * 10)
    assert after == {**before, "head_simulation": 2 * heads, "feature_simulation": 2 * features}


def test_training_costs_three_forward_passes_and_only_scores_and_values_grow_with_the_length() -> None:
    config = small_config(attention={"kind": "sas", "num_heads": 4, "head_dim": 6})
    forward, longer = count_forward_flops(config), count_forward_flops(config, sequence_length=36)
    assert TRAINING_FACTOR == 3
    assert count_training_flops(config) == {term: 3 * count for term, count in forward.items()}
    for term, count in forward.items():
        assert longer[term] == count * (3 if term in ("scores", "values") else 1), term


def test_recomputation_does_not_change_the_models_flops() -> None:
    attention = {"kind": "sas", "num_heads": 4, "head_dim": 6}
    plain = small_config(attention=attention)
    recomputed = small_config(attention=attention, training={"recompute": "full"})
    assert count_training_flops(recomputed) == count_training_flops(plain)
    again = count_recompute_flops(recomputed, device="gpu")
    forward = count_forward_flops(plain)
    # Each layer is computed a second time, and fused attention computes the scores a third time.
    assert again == {
        term: count * (2 if term == "scores" else 1) for term, count in forward.items() if term != "head"
    }


def test_chunked_attention_saves_its_weights_and_runs_only_on_a_cpu() -> None:
    config = small_config(attention={"kind": "mha", "num_heads": 4, "head_dim": 6})
    assert count_recompute_flops(config, device="cpu") == {}
    assert count_recompute_flops(config, device="cpu", sequence_length=2000).keys() == {"scores"}
    assert count_recompute_flops(config, device="gpu").keys() == {"scores"}


def test_the_causal_half_applies_to_scores_and_values() -> None:
    config = small_config()
    flops = count_forward_flops(config)
    halved = causal_half(flops, sequence_length=12)
    assert {term: halved[term] / flops[term] for term in flops} == {
        term: 13 / 24 if term in ("scores", "values") else 1.0 for term in flops
    }
