"""The counted costs against a built model: parameters exactly, FLOPs as torch's counter sees them run."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sas_megatron.config.attention import parse_attention
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.model.costs import (
    TRAINING_FACTOR,
    count_forward_flops,
    count_parameters,
    count_training_flops,
)
from tests.conftest import ROOT
from tests.model.config_strategies import small_runs
from tests.rank_pool import in_layout
from tests.run_configs import small_config

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))

# Part of a parameter's name -> the term that counts it; the first that matches.
TERM_OF_PARAMETER = {
    "embedding.": "embedding",
    "output_layer.": "head",
    "linear_qkv.": "qkv",
    "linear_query_up.": "query_up",
    "linear_proj.": "projection",
    "linear_q_proj.": "query",
    "linear_q_down_proj.": "query_down",
    "linear_q_up_proj.": "query_up",
    "linear_kv_down_proj.": "key_value_down",
    "linear_kv_up_proj.": "key_value_up",
    "q_layernorm.": "latent_norms",
    "kv_layernorm.": "latent_norms",
    "simulation.heads.": "head_simulation",
    "simulation.features.": "feature_simulation",
    "mlp.": "mlp",
    "layernorm.": "norms",
}


@contextlib.contextmanager
def _without_storage() -> Iterator[None]:
    """Modules are built on torch's meta device: shapes and no numbers, at any size."""
    from sas_megatron.model import assembly

    device, initialize = torch.cuda.current_device, assembly.initialize_weights
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment]
    assembly.initialize_weights = lambda *_arguments: None
    try:
        yield
    finally:
        torch.cuda.current_device, assembly.initialize_weights = device, initialize


def _built_parameters(config: RunConfig) -> dict[str, int]:
    from sas_megatron.model.assembly import build_gpt_pieces

    in_layout(ParallelConfig())
    with _without_storage():
        (model,) = build_gpt_pieces(config)
    terms: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "meta", name
        terms[next(term for part, term in TERM_OF_PARAMETER.items() if part in name)] += parameter.numel()
    return dict(terms)


def _executed_flops(config: RunConfig) -> dict[str, float]:
    """By term, for one token: matrix products and convolutions as `torch.utils.flop_counter` counts them.

    That is two FLOPs a multiply-add; a convolution counts every tap at every feature, those that
    fall on padding included; biases, norms, softmax and other element-wise work count nothing; the
    unfused scores are computed in full, without the causal half.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from sas_megatron.model.assembly import build_gpt_pieces

    in_layout(ParallelConfig())
    (model,) = build_gpt_pieces(config)
    length = config.data.sequence_length
    tokens = torch.zeros(config.training.micro_batch_size, length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(length).expand_as(tokens), None)
    counts = counter.get_flop_counts()

    def of_modules(ending: str, *, convolutions: bool | None = None) -> int:
        return sum(
            count
            for module, operations in counts.items()
            if module.endswith(ending)
            for operation, count in operations.items()
            if convolutions is None or ("conv" in str(operation)) == convolutions
        )

    parts: dict[str, int] = defaultdict(int)
    for name, term in TERM_OF_PARAMETER.items():
        if name.startswith("linear_"):
            parts[term] += of_modules(f"self_attention.{name.removesuffix('.')}")
    parts["scores and values"] = of_modules("self_attention.core_attention")
    # What of the layer's other products is no convolution.
    others = {"tpa": "factor_products", "mfa": "query_up"}.get(config.attention.kind, "feature_simulation")
    parts[others] += of_modules(".self_attention", convolutions=False) - sum(parts.values())
    executed = {
        **parts,
        "head_simulation": of_modules(".self_attention", convolutions=True),
        "mlp": of_modules(".mlp"),
        "head": of_modules(".output_layer"),
    }
    assert sum(executed.values()) == counter.get_total_flops(), "a product belongs to no term"
    return {term: count / tokens.numel() for term, count in executed.items()}


def _counted_flops(config: RunConfig) -> dict[str, float]:
    """`count_forward_flops` in the terms of `_executed_flops`."""
    counted: dict[str, float] = dict(count_forward_flops(config))
    counted["scores and values"] = counted.pop("scores") + counted.pop("values")
    return counted


def without_zeros(terms: dict[str, Any]) -> dict[str, Any]:
    return {term: count for term, count in terms.items() if count}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_parameters_of_a_shipped_config_are_those_of_the_built_model(ranks: Any, path: Any) -> None:
    config = load_run_config(path, ["parallel.tensor=1", "parallel.sequence=false"])
    assert ranks(1).run(_built_parameters, config) == [without_zeros(count_parameters(config))]


# The same examples each time: a suite that fails must fail again.
SWEEP = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@SWEEP
@given(config=small_runs())
def test_parameters_of_any_config_are_those_of_the_built_model(ranks: Any, config: RunConfig) -> None:
    (built,) = ranks(1).run(_built_parameters, config)
    assert built == without_zeros(count_parameters(config))


@SWEEP
@given(config=small_runs())
def test_flops_of_any_config_are_those_that_run(ranks: Any, config: RunConfig) -> None:
    (executed,) = ranks(1).run(_executed_flops, config)
    assert without_zeros(executed) == without_zeros(_counted_flops(config))


@pytest.mark.parametrize(
    "name", ["quickstart_sas", "quickstart_gqa", "quickstart_mla", "quickstart_tpa", "quickstart_mfa"]
)
def test_flops_of_a_shipped_config_are_those_that_run(ranks: Any, name: str) -> None:
    overrides = [
        "parallel.tensor=1",
        "attention.backend=unfused",
        "data.sequence_length=33",
        "model.num_layers=2",
    ]
    config = load_run_config(ROOT / "configs" / f"{name}.yaml", [*overrides, "training.micro_batch_size=1"])
    (executed,) = ranks(1).run(_executed_flops, config)
    assert without_zeros(executed) == without_zeros(_counted_flops(config))


# d, h, d_h, d_h^R, d_c, d_c' of the paper; those of DeepSeek-V2 and of DeepSeek-V2-Lite.
PUBLISHED = {
    "DeepSeek-V2": (5120, 128, 128, 64, 512, 1536),
    "DeepSeek-V2-Lite": (2048, 16, 128, 64, 512, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_latent_attention_has_the_published_number_of_parameters(name: str) -> None:
    hidden, heads, width, rotary, latent, query_latent = PUBLISHED[name]
    attention = parse_attention(
        {
            "kind": "mla",
            "num_heads": heads,
            "head_dim": width,
            "rotary_head_dim": rotary,
            "kv_lora_rank": latent,
            "query_lora_rank": query_latent,
        }
    )
    queries = heads * width + heads * rotary
    expected = (
        (hidden * queries if query_latent is None else query_latent * (hidden + queries))
        + latent * (hidden + 2 * heads * width)
        + hidden * (heads * width + rotary)
    )
    counted = attention.count_parameters(hidden, linear_bias=False)
    assert counted.pop("latent_norms") == latent + (query_latent or 0)
    assert sum(counted.values()) == expected
    assert sum(attention.count_kv_cache_elements().values()) == 576  # 4.5·d_h, table 1 of the paper


def test_training_costs_three_forwards_and_scores_alone_grow_with_the_length() -> None:
    config = small_config(attention={"kind": "sas", "num_heads": 4, "head_dim": 6})
    forward, longer = count_forward_flops(config), count_forward_flops(config, sequence_length=36)
    assert TRAINING_FACTOR == 3
    assert count_training_flops(config) == {term: 3 * count for term, count in forward.items()}
    for term, count in forward.items():
        assert longer[term] == count * (3 if term in ("scores", "values") else 1), term
