"""Initial weights: equal in every layout, different for each seed, distributed as documented."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from sas_megatron.attention.tpa.config import TensorProductAttentionConfig
from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.model.model_parts import initial_weights, joined_weights, logits_part
from tests.run_configs import small_config
from tests.small_attentions import GQA, MFA, MHA, SAS_GROUPED, TPA, TPA_UNFACTORED_QUERIES
from tests.tolerances import assert_near

SAS = {**SAS_GROUPED, "head_expansion": 2}


TRAINING = {"num_steps": 9, "global_batch_size": 4, "micro_batch_size": 2, "seed": 3}


def config_of(attention: dict[str, Any], tensor: int = 1, seed: int = 3, **model: Any) -> RunConfig:
    return small_config(
        attention=attention,
        model=model,
        parallel={"tensor": tensor},
        training={**TRAINING, "seed": seed},
    )


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "attention",
    [MHA, SAS, TPA, MFA, {**small.DIFF, **small.MODIFIERS}],
    ids=["mha", "sas", "tpa", "mfa", "diff, modified"],
)
def test_shards_form_the_same_full_weights_for_any_number_of_ranks(
    ranks: Any, attention: dict[str, Any], activation: str
) -> None:
    biased = activation == "gelu"
    make = functools.partial(config_of, attention, activation=activation, linear_bias=biased)
    (alone,) = ranks(1).run(initial_weights, make(1))
    assert any(part.num_matrices == 2 for part in alone.values()) == (activation == "swiglu")
    full = joined_weights([alone])
    for tensor in (2, 4):
        joined = joined_weights(ranks(tensor).run(initial_weights, make(tensor)))
        assert joined.keys() == full.keys()
        for name, weight in full.items():
            assert torch.equal(joined[name], weight), f"{name} at {tensor} ranks"


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_pipeline_stages_start_with_the_weights_of_one_process(ranks: Any, tie_embeddings: bool) -> None:
    """Two tensor ranks, two stages and two chunks each; a tied embedding is on both stages."""
    model = {"num_layers": 4, "tie_embeddings": tie_embeddings}
    (alone,) = ranks(1).run(initial_weights, config_of(SAS, **model))
    layout = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}
    by_rank = ranks(4).run(
        initial_weights, small_config(attention=SAS, model=model, parallel=layout, training=TRAINING)
    )
    full, found = joined_weights([alone]), set()
    for stage in (by_rank[:2], by_rank[2:]):
        for name, weight in joined_weights(stage).items():
            assert torch.equal(weight, full[name]), name
            found.add(name)
    assert found == full.keys()


def test_rows_that_pad_the_vocabulary_do_not_change_other_weights(ranks: Any) -> None:
    padded, wider = (
        joined_weights(ranks(2).run(initial_weights, config_of(SAS, 2, vocab_multiple=multiple)))
        for multiple in (2, 64)
    )
    tables = {"embedding.word_embeddings.weight", "output_layer.weight"}
    for name, weight in padded.items():
        assert torch.equal(wider[name][: len(weight)], weight), name
        assert (len(weight), len(wider[name])) == ((46, 64) if name in tables else (len(weight),) * 2), name


def count_drawn_numbers(config: RunConfig) -> tuple[int, int]:
    """Return how many numbers a rank draws, and how many its matrices and biases have."""
    from sas_megatron.model.weight_stream import WeightStream

    num_drawn, words = 0, WeightStream.words

    def count(stream: Any, counter: int, num_counters: int) -> Any:
        nonlocal num_drawn
        num_drawn += 8 * num_counters
        return words(stream, counter, num_counters)

    WeightStream.words = count  # type: ignore[method-assign]
    try:
        weights = initial_weights(config)
    finally:
        WeightStream.words = words  # type: ignore[method-assign]
    return num_drawn, sum(part.tensor.numel() for name, part in weights.items() if "layernorm" not in name)


def test_a_rank_draws_only_its_shard(ranks: Any) -> None:
    model = {"hidden_size": 64, "ffn_hidden_size": 256}
    attention = {"kind": "mha", "num_heads": 8, "head_dim": 16}
    for num_drawn, num_local in ranks(4).run(count_drawn_numbers, config_of(attention, 4, **model)):
        assert 0 < num_drawn <= 1.01 * num_local


@pytest.mark.parametrize("initialization", ["authors", "normal", "identity"])
def test_simulation_weights_are_equal_on_all_ranks_for_each_scheme(ranks: Any, initialization: str) -> None:
    attention = {**SAS, "initialization": initialization}
    full = joined_weights(ranks(1).run(initial_weights, config_of(attention)))
    joined = joined_weights(ranks(2).run(initial_weights, config_of(attention, tensor=2)))
    assert all(torch.equal(joined[name], weight) for name, weight in full.items())


def test_weights_depend_on_the_seed_only(ranks: Any) -> None:
    first, again, other = (
        joined_weights(ranks(1).run(initial_weights, config_of(SAS, seed=seed))) for seed in (3, 3, 4)
    )
    for name, weight in first.items():
        assert torch.equal(again[name], weight), name
        constant = "layernorm" in name
        assert torch.equal(other[name], weight) == constant, name


def test_no_two_parameters_start_with_equal_weights(ranks: Any) -> None:
    weights = joined_weights(ranks(1).run(initial_weights, config_of(SAS)))
    drawn = {name: weight.flatten()[:24] for name, weight in weights.items() if "layernorm" not in name}
    for name, weight in drawn.items():
        for other, values in drawn.items():
            shared = min(len(weight), len(values))
            assert name == other or not torch.equal(weight[:shared], values[:shared]), f"{name} and {other}"


def test_weights_have_the_documented_distribution(ranks: Any) -> None:
    config = config_of(
        SAS,
        hidden_size=60,
        ffn_hidden_size=120,
        num_layers=3,
        init_std=0.05,
        linear_bias=True,
        vocab_size=300,
    )
    weights = joined_weights(ranks(1).run(initial_weights, config))
    for name, weight in weights.items():
        if ".simulation." in name:
            matrix = weights[name.removesuffix("_bias")]
            bound = 1 / math.sqrt(matrix[0].numel())
            assert weight.abs().max() <= bound, name
            assert weight.numel() < 20 or weight.abs().max() >= bound / 2, name
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 1:
            assert bool((weight == 1).all()), name
        else:
            ends_branch = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.05 / math.sqrt(6) if ends_branch else 0.05
            # Five standard errors, which are σ/√(2n) each.
            assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel()), name


def xavier_bound(*shape: int) -> float:
    """Return the bound of `xavier_uniform_`, computed by torch itself, for a tensor of this shape."""
    return float(torch.nn.init.xavier_uniform_(torch.empty(shape, dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("attention", [TPA, TPA_UNFACTORED_QUERIES], ids=["all factorized", "KV-only"])
def test_tensor_products_start_as_in_the_authors_code(ranks: Any, attention: dict[str, Any]) -> None:
    """The authors apply `xavier_uniform_` to [H, N, R] and [H, R, D] views (tensorgi/T6, model/T6.py)."""
    hidden, model = 60, {"hidden_size": 60, "num_layers": 2, "init_std": 0.05}
    authors, normal = (
        joined_weights(
            ranks(1).run(initial_weights, config_of({**attention, "initialization": name}, **model))
        )
        for name in ("authors", "normal")
    )
    config = config_of(attention, **model).attention
    heads, head_dim = config.num_heads, config.head_dim
    ranks_of = {"key": config.key_rank, "value": config.value_rank}
    if attention is TPA:
        ranks_of["query"] = config.resolved_fields()["query_rank"]
    expected = {"heads.query": xavier_bound(heads * head_dim, hidden)}
    for tensor, rank in ranks_of.items():
        expected[f"heads.{tensor}"] = xavier_bound(hidden, heads, rank)
        expected[f"features.{tensor}"] = xavier_bound(hidden, rank, head_dim)
    found = set()
    for name, weight in authors.items():
        if name.endswith("self_attention.linear_proj.weight"):
            assert not weight.any(), name
            assert normal[name].std() > 0.02, name
        elif ".linear_qkv." in name:
            factor = name.partition(".linear_qkv.")[2]
            found.add(factor)
            # The largest of n uniform numbers falls short of the bound by 1/(n + 1) on average.
            assert weight.abs().max() == pytest.approx(expected[factor], rel=0.05), name
            assert abs(normal[name].std().item() / 0.05 - 1) < 5 / math.sqrt(2 * weight.numel()), name
    assert found == expected.keys()


def test_tensor_products_no_longer_start_wider_than_in_the_authors_code() -> None:
    """Xavier's rule for matrices, which was used before, is this many times as wide at 34 heads of 64."""
    config = TensorProductAttentionConfig(num_heads=34, head_dim=64, query_rank=6)
    columns = {"heads.query": 34 * 6, "features.query": 6 * 64, "heads.key": 34 * 2, "features.key": 2 * 64}
    ratios = {
        factor: math.sqrt(6 / (768 + rows))
        / config.initial_weights(f"linear_qkv.{factor}", (rows, 768)).scale
        for factor, rows in columns.items()
    }
    measured = {"heads.query": 2.23, "features.query": 6.56, "heads.key": 1.39, "features.key": 7.42}
    assert ratios == pytest.approx(measured, abs=0.01)


def test_the_normal_scheme_preserves_the_variance_of_heads_and_features(ranks: Any) -> None:
    weights = joined_weights(ranks(1).run(initial_weights, config_of({**SAS, "initialization": "normal"})))
    matrices = {
        name: weight
        for name, weight in weights.items()
        if ".simulation." in name and not name.endswith("bias")
    }
    assert matrices
    for name, weight in matrices.items():
        std = 1 / math.sqrt(weight[0].numel())
        assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel()), name
        assert not weights[f"{name}_bias"].any(), name


def test_the_output_projection_of_sas_may_start_as_a_torch_linear_layer(ranks: Any) -> None:
    """The authors' module has torch's default, whose bound torch computes here."""
    scaled, torch_default = (
        joined_weights(
            ranks(2).run(initial_weights, config_of({**SAS, "output_initialization": name}, tensor=2))
        )
        for name in ("scaled", "torch")
    )
    for name, weight in torch_default.items():
        if name.endswith("self_attention.linear_proj.weight"):
            layer = torch.nn.Linear(weight.shape[1], 20_000, dtype=torch.float64)
            bound = layer.weight.abs().max().item()
            assert 0.95 * bound < weight.abs().max() <= bound * 1.001, name
            assert abs(weight.std().item() / layer.weight.std().item() - 1) < 5 / math.sqrt(
                2 * weight.numel()
            )
        else:
            assert torch.equal(weight, scaled[name]), name


def test_wang_initialization_of_output_projections(ranks: Any) -> None:
    """GPT-NeoX's `wang_init_method`: standard deviation 2 / num_layers / sqrt(hidden_size)."""
    model = {"hidden_size": 60, "ffn_hidden_size": 120, "num_layers": 3, "init_std": 0.05}
    scaled, wang = (
        joined_weights(ranks(1).run(initial_weights, config_of(MHA, **model, output_init=name)))
        for name in ("scaled", "wang")
    )
    for name, weight in wang.items():
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std = 2 / 3 / math.sqrt(60)
            assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel()), name
        else:
            assert torch.equal(weight, scaled[name]), name


def test_identity_starts_as_the_base_model(ranks: Any) -> None:
    (base,) = ranks(1).run(logits_part, config_of(GQA))
    (simulated,) = ranks(1).run(logits_part, config_of({**SAS, "initialization": "identity"}))
    # The simulation is drawn in float32, so (E/D)^¼ carries a rounding of 1e-7.
    assert_near(simulated, base, torch.float32, "logits")
