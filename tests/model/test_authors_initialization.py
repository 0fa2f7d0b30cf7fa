"""The start of every kind, tensor by tensor, against its authors' code or paper, and the table in the docs.

Each published rule is applied by torch's own initialization function to a tensor of the published shape.
Sizes: hidden 768, 12 layers, 12 heads of 64, and each kind's default ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sas_megatron.config.run import RunConfig
from tests.conftest import ROOT
from tests.model.model_parts import initial_weights
from tests.run_configs import small_config

H, N, D, LAYERS = 768, 12, 64, 12
HEADS = {"num_heads": N, "head_dim": D}
# Enough random numbers for a standard deviation to within a per cent.
ENOUGH = 20_000

Published = dict[str, float]


def drawn_std(initialize: Callable[[torch.Tensor], Any], *shape: int) -> float:
    """Return the standard deviation that a torch function gives to a weight of this shape."""
    draws = [torch.empty(shape) for _ in range(1 + ENOUGH // math.prod(shape))]
    for weight in draws:
        initialize(weight)
    return float(torch.stack(draws).std())


def xavier(*shape: int) -> float:
    """`torch.nn.init.xavier_uniform_` and TensorFlow's variance scaling with fan_avg have equal bounds."""
    return drawn_std(nn.init.xavier_uniform_, *shape)


def torch_default(module: Callable[[], nn.Module]) -> float:
    """Return the standard deviation of the weight of a torch module, over many modules."""
    weights = [module().weight for _ in range(3)]
    while sum(weight.numel() for weight in weights) < ENOUGH:
        weights.append(module().weight)
    return float(torch.stack(weights).detach().std())


def published_multi_head() -> Published:
    """tensorflow/tensor2tensor, layers/common_attention.py: four dense layers with uniform_unit_scaling."""
    return {"linear_qkv": xavier(N * D, H), "linear_proj": xavier(H, N * D)}


def published_grouped() -> Published:
    """tensorflow/mesh, transformer/attention.py, init_weights: N(0, H^-0.5), and (heads·D)^-0.5 for o.

    The query's further factor D^-0.5 replaces the scale of the scores there.
    """
    return {"linear_qkv": H**-0.5, "linear_proj": (N * D) ** -0.5}


def published_latent() -> Published:
    """arXiv 2405.04434, section 3.1.2, and 2412.19437, section 4.2: all learnable parameters at 0.006."""
    names = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
    return dict.fromkeys((*names, "linear_proj"), 0.006)


def published_factorized() -> Published:
    """stepfun-ai/step3, modeling_step3.py: no initialization, so that of `PreTrainedModel`, N(0, 0.02)."""
    return dict.fromkeys(("linear_qkv", "linear_query_up", "linear_proj"), 0.02)


def published_tensor_product() -> Published:
    """tensorgi/TPA, model/T6.py, CPLinear.reset_parameters, and `c_proj.weight.data.zero_()`."""
    ranks = {"query": 6, "key": 2, "value": 2}
    heads = {f"linear_qkv.heads.{name}": xavier(H, N, rank) for name, rank in ranks.items()}
    features = {f"linear_qkv.features.{name}": xavier(H, rank, D) for name, rank in ranks.items()}
    return {**heads, **features, "linear_proj": 0.0}


def published_simulated() -> Published:
    """chuanyang-Zheng/SAS, SAS.py: torch's defaults of Conv1d and Linear."""
    names = ("query", "key", "value")
    first = torch_default(lambda: nn.Conv1d(N, 3 * N, 3, 1, 1))
    refined = torch_default(lambda: nn.Conv1d(3 * N, 3 * N, 3, 1, 1))
    expanded, wide = torch_default(lambda: nn.Linear(D, 96)), torch_default(lambda: nn.Linear(96, 96))
    return {
        **{f"simulation.heads.{name}.expand": first for name in names},
        **{f"simulation.heads.{name}.refine": refined for name in names},
        **{f"simulation.features.{name}.expand": expanded for name in ("query", "key")},
        **{f"simulation.features.{name}.refine": wide for name in ("query", "key")},
        "linear_proj": torch_default(lambda: nn.Linear(N * D, N * D)),
    }


# Fields with which a kind starts as its authors publish; the published rules; fields of the model.
KINDS: dict[str, tuple[dict[str, Any], Callable[[], Published], dict[str, Any]]] = {
    "mha": ({"initialization": "authors"}, published_multi_head, {}),
    "gqa": ({"initialization": "authors", "num_kv_heads": 4}, published_grouped, {}),
    "mqa": ({"initialization": "authors"}, published_grouped, {}),
    "mla": (
        {
            "initialization": "authors",
            "rotary_head_dim": 32,
            "kv_lora_rank": 256,
            "query_lora_rank": 232,
        },
        published_latent,
        {},
    ),
    "mfa": ({"query_rank": 192}, published_factorized, {"output_init": "normal"}),
    "tpa": ({}, published_tensor_product, {}),
    "sas": ({"output_initialization": "torch"}, published_simulated, {}),
}


def config_of(kind: str, **fields: Any) -> RunConfig:
    model = {"hidden_size": H, "num_layers": 1, "ffn_hidden_size": 8}
    return small_config(attention={"kind": kind, **HEADS, **fields}, model={**model, **KINDS[kind][2]})


def stds_of_matrices(ranks: Any, config: RunConfig) -> dict[str, float]:
    """Return the standard deviation of each matrix of the first layer's attention."""
    (parts,) = ranks(1).run(initial_weights, config)
    prefix = "decoder.layers.0.self_attention."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): float(part.tensor.double().std())
        for name, part in parts.items()
        if name.startswith(prefix) and part.tensor.dim() > 1
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_starts_as_its_authors_publish(ranks: Any, kind: str) -> None:
    fields, published, _ = KINDS[kind]
    rules, found = published(), stds_of_matrices(ranks, config_of(kind, **fields))
    unpublished = {"linear_qkv"} if kind == "sas" else set()
    assert found.keys() - unpublished == rules.keys()
    for name, std in rules.items():
        assert found[name] == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa", "mla", "mfa"])
def test_the_default_start_of_these_kinds_is_gpt2s(ranks: Any, kind: str) -> None:
    """N(0, 0.02), and 1/√(2·layers) of it for the output projection (Radford et al. 2019, section 2.3)."""
    fields = {name: value for name, value in KINDS[kind][0].items() if name != "initialization"}
    config = small_config(
        attention={"kind": kind, **HEADS, **fields},
        model={"hidden_size": H, "num_layers": 2, "ffn_hidden_size": 8},
    )
    for name, std in stds_of_matrices(ranks, config).items():
        assert std == pytest.approx(0.01 if name == "linear_proj" else 0.02, rel=0.03), name


# The rows of the table in docs/initial_weights.md: the kind and the first tensor of a row in this module.
ROWS: dict[tuple[str, str], tuple[str, str]] = {
    ("`mha`", "q, k, v, o"): ("mha", "linear_qkv"),
    ("`gqa`, `mqa`", "q, k, v"): ("gqa", "linear_qkv"),
    ("`gqa`, `mqa`", "o"): ("gqa", "linear_proj"),
    ("`mla`", "all"): ("mla", "linear_proj"),
    ("`mfa`", "all"): ("mfa", "linear_qkv"),
    ("`tpa`", "A of q"): ("tpa", "linear_qkv.heads.query"),
    ("`tpa`", "A of k, v"): ("tpa", "linear_qkv.heads.key"),
    ("`tpa`", "B of q"): ("tpa", "linear_qkv.features.query"),
    ("`tpa`", "B of k, v"): ("tpa", "linear_qkv.features.key"),
    ("`tpa`", "o"): ("tpa", "linear_proj"),
    ("`sas`", "heads, first map"): ("sas", "simulation.heads.query.expand"),
    ("`sas`", "heads, second map"): ("sas", "simulation.heads.query.refine"),
    ("`sas`", "features, first map"): ("sas", "simulation.features.query.expand"),
    ("`sas`", "features, second map"): ("sas", "simulation.features.query.refine"),
    ("`sas`", "o"): ("sas", "linear_proj"),
}


# Rows without a published rule, which state that of this package.
UNPUBLISHED = {("`diff`", "λ")}


def test_the_table_in_the_docs_states_the_published_standard_deviations() -> None:
    page = (ROOT / "docs" / "initial_weights.md").read_text(encoding="utf-8")
    table = page.partition("| kind | tensor | authors' start | σ at 768 |")[2].partition("\n\n")[0]
    stated = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \| ([0-9.]+) \|", table, flags=re.MULTILINE)
    stated = [row for row in stated if row[:2] not in UNPUBLISHED]
    assert {(kind, tensor) for kind, tensor, _ in stated} == ROWS.keys()
    rules = {kind: KINDS[kind][1]() for kind in {kind for kind, _ in ROWS.values()}}
    for kind, tensor, std in stated:
        name, key = ROWS[kind, tensor]
        assert float(std) == pytest.approx(rules[name][key], rel=0.02), (kind, tensor)
