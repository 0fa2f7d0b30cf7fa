"""The counted communication equals that of a dry run, which equals that of gloo ranks (tests/planning)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import KINDS, VariantNames
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.communication import count_communication_bytes
from tests.conftest import ROOT
from tests.model.random_layouts import runs_with_layouts
from tests.run_configs import small_config
from tests.selection import cases, exhaustive
from tests.training.layouts import ATTENTIONS, OVERLAP, TIED

SHIPPED = sorted(str(path) for path in (ROOT / "configs").glob("*.yaml"))
SHARDED = {"learning_rate": 0.01, "distributed": True}
HALF = {"precision": "bfloat16"}
BIASED = {"linear_bias": True, "normalization": "layernorm", "activation": "gelu"}
# Layers of about 40 million elements, at which buckets end, which shows in their padding.
WIDE = {"num_layers": 2, "hidden_size": 1780, "ffn_hidden_size": 8228, "vocab_size": 512}
WIDE_HEADS = {"kind": "mha", "num_heads": 32, "head_dim": 64}


def sas(**fields: Any) -> dict[str, Any]:
    return {"kind": "sas", "num_heads": 4, "head_dim": 6, "head_expansion": 2, **fields}


def mla(**fields: Any) -> dict[str, Any]:
    return {**ATTENTIONS["mla"], **fields}


MHA, GQA, TPA, MFA = (ATTENTIONS[name] for name in ("mha", "gqa", "tpa", "mfa"))
MQA = {"kind": "mqa", "num_heads": 4, "head_dim": 6}
WITHOUT_HEADS = {f"simulate_{name}_heads": False for name in ("query", "key", "value")}

# World size, attention, `parallel`, other sections; one layer unless stated. Each parallel axis is combined
# with each kind that it affects.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "tensor 2, mha": (2, MHA, {"tensor": 2}, {"model": BIASED}),
    "tensor 3, sequence, gqa": (
        3,
        {**GQA, "num_heads": 9, "num_kv_heads": 3},
        {"tensor": 3, "sequence": True},
        {"model": {**BIASED, "ffn_hidden_size": 27, "vocab_multiple": 3}, "training": {"recompute": "full"}},
    ),
    "tensor 4, shared key heads, mqa": (
        4,
        MQA,
        {"tensor": 4},
        {"training": {"recompute": "selective", "recompute_modules": ["mlp"]}},
    ),
    "tensor 2, mla": (2, mla(), {"tensor": 2}, {"training": HALF}),
    "tensor 2, sequence, mla, queries whole": (
        2,
        mla(query_lora_rank=None, value_head_dim=5),
        {"tensor": 2, "sequence": True},
        {"training": HALF},
    ),
    "tensor 2, tpa": (2, TPA, {"tensor": 2}, {}),
    "tensor 2, sequence, tpa, queries whole": (
        2,
        {**TPA, "factorize_query": False, "key_rank": 3},
        {"tensor": 2, "sequence": True},
        {"training": HALF},
    ),
    "tensor 4, mfa": (
        4,
        MFA,
        {"tensor": 4},
        {"model": {"num_layers": 2}, "training": {"recompute": "full", "recompute_layers": 1}},
    ),
    "tensor 2, sequence, mfa, data 2": (
        4,
        MFA,
        {"tensor": 2, "sequence": True},
        {"optimizer": SHARDED, "model": BIASED, "training": {"global_batch_size": 8}},
    ),
    "tensor 2, sequence, diff, modified": (
        2,
        {**ATTENTIONS["diff"], "output_norm": True},
        {"tensor": 2, "sequence": True},
        {"training": {**HALF, "recompute": "full"}},
    ),
    "tensor 4, gqa, headwise gates": (4, ATTENTIONS["modified"], {"tensor": 4}, {}),
    "tensor 2, context 2, diff": (
        4,
        {"kind": "diff", "num_heads": 4, "head_dim": 6},
        {"tensor": 2, "context": 2},
        {},
    ),
    "tensor 2, sas, gather": (2, sas(exchange="gather"), {"tensor": 2}, {"training": HALF}),
    "tensor 4, sequence, sas, all to all": (
        4,
        sas(exchange="all_to_all", num_kv_heads=2, simulation_bias=False),
        {"tensor": 4, "sequence": True},
        {"training": {"recompute": "selective", "recompute_modules": ["simulation"]}},
    ),
    "tensor 4, sas, all to all of uneven tokens": (
        4,
        sas(exchange="all_to_all", simulate_value_heads=False),
        {"tensor": 4},
        {"data": {"sequence_length": 7}, "training": {"recompute": "selective"}},
    ),
    "tensor 2, sas, auto": (2, sas(), {"tensor": 2}, {}),
    "tensor 4, sas, auto": (4, sas(head_expansion=1, num_kv_heads=1), {"tensor": 4}, {}),
    "tensor 2, sas, heads alone": (2, sas(simulate_features=False), {"tensor": 2}, {}),
    "tensor 4, sas, features alone": (4, sas(**WITHOUT_HEADS, num_kv_heads=2), {"tensor": 4}, {}),
    "context 2, gqa": (2, GQA, {"context": 2}, {"training": HALF}),
    "context 4, copied keys, mqa": (
        4,
        MQA,
        {"context": 4},
        {"data": {"sequence_length": 16}, "training": {"recompute": "full"}},
    ),
    "context 2, sas, mean before": (2, sas(), {"context": 2}, {}),
    "context 4, sas, copied keys": (
        4,
        sas(num_kv_heads=1),
        {"context": 4},
        {"data": {"sequence_length": 16}},
    ),
    "tensor 2, context 2, sas, keys as they come": (
        4,
        sas(num_kv_heads=1),
        {"tensor": 2, "context": 2},
        {"training": {"recompute": "selective", "recompute_modules": ["attention"]}},
    ),
    "tensor 2, context 4, sas, mean after": (
        8,
        sas(num_kv_heads=2),
        {"tensor": 2, "context": 4},
        {"data": {"sequence_length": 16}},
    ),
    "context 2, mla": (2, mla(value_head_dim=5), {"context": 2}, {}),
    "pipeline 3, uneven": (
        3,
        MHA,
        {"pipeline": 3, "first_stage_layers": 2},
        {"model": {"num_layers": 4, "tie_embeddings": True}},
    ),
    "tensor 2, sequence, pipeline 2 interleaved, tied, data 2": (
        8,
        GQA,
        {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, **OVERLAP},
        {
            "model": {**TIED, "num_layers": 8},
            "optimizer": SHARDED,
            "training": {"recompute": "full", "recompute_layers": 1, "global_batch_size": 8},
        },
    ),
    "data 3": (3, MHA, {"overlap_gradient_reduce": True}, {"training": {"global_batch_size": 12}}),
    "data 3, distributed optimizer, tied": (
        3,
        sas(),
        {},
        {"optimizer": SHARDED, "model": TIED, "training": {"global_batch_size": 12, **HALF}},
    ),
    "tied pipeline 2, context 2, data 2, distributed optimizer": (
        8,
        GQA,
        {"pipeline": 2, "context": 2},
        {"optimizer": {**SHARDED, "clip_gradient_norm": 0.0}, "model": {**TIED, "num_layers": 2}},
    ),
    "buckets of 52 data ranks": (
        104,
        WIDE_HEADS,
        {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP},
        {
            "optimizer": SHARDED,
            "model": {**WIDE, "num_layers": 12},
            "training": {"global_batch_size": 104, "micro_batch_size": 1},
        },
    ),
    "one bucket, however large": (2, WIDE_HEADS, {}, {"optimizer": SHARDED, "model": WIDE}),
}


def _sent(config: RunConfig, world_size: int, stage: int) -> dict[str, float]:
    """Return the bytes by group that a rank of the stage sends in a step, without process groups."""
    from sas_megatron.planning.rank_estimate import estimate_rank

    ranks_per_stage = world_size // config.parallel.pipeline
    length = config.data.sequence_length // config.parallel.context
    # The count is that of the first rank, and of every rank if the tokens can be divided evenly.
    is_even = config.training.micro_batch_size * length % config.parallel.tensor == 0
    rank = stage * ranks_per_stage + (ranks_per_stage - 1 if is_even else 0)
    step = estimate_rank(config, rank=rank, world_size=world_size).step
    return {group: step.group_bytes(group) for group in step.bytes_sent}


# A rank's share may be a fraction of bytes: the error of rounding, and of float64.
HALF_A_BYTE = 0.5 + 1e-6


def _assert_counted(separate_process: Any, config: RunConfig, world_size: int, stage: int) -> None:
    sent = separate_process(_sent, config, world_size, stage)
    terms = count_communication_bytes(config, world_size=world_size, stage=stage)
    counted = {group: sum(of_group.values()) for group, of_group in terms.items()}
    assert counted.keys() == sent.keys()
    for group, num_bytes in sent.items():
        assert abs(counted[group] - num_bytes) <= HALF_A_BYTE, f"{group}, stage {stage}: {terms[group]}"


# Cases that only repeat terms and conditions that other cases cover.
REPEATED = {
    "tensor 2, mha",
    "tensor 4, shared key heads, mqa",
    "tensor 2, sas, gather",
    "tensor 2, sas, auto",
    "tensor 4, sas, auto",
    "tensor 2, sas, heads alone",
    "tensor 4, sas, features alone",
    "context 2, gqa",
    "context 4, copied keys, mqa",
    "context 2, sas, mean before",
    "data 3",
}


@pytest.mark.parametrize("case", cases(CASES, default=CASES.keys() - REPEATED))
def test_the_bytes_of_each_group_equal_those_of_a_dry_run(separate_process: Any, case: str) -> None:
    world_size, attention, parallel, sections = CASES[case]
    model = {"num_layers": 1, **sections.get("model", {})}
    config = small_config(attention=attention, parallel=parallel, **{**sections, "model": model})
    for stage in range(config.parallel.pipeline):
        _assert_counted(separate_process, config, world_size, stage)


@exhaustive
# The same examples in each run, so that failures are reproducible.
@settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(run=runs_with_layouts())
def test_the_bytes_of_any_run_equal_those_of_a_dry_run(
    separate_process: Any, run: tuple[RunConfig, int, int]
) -> None:
    config, world_size, stage = run
    _assert_counted(separate_process, config, world_size, stage)


def test_each_term_equals_its_formula() -> None:
    """Each formula once, in the letters of the operator, for a layout with all terms."""
    config = small_config(
        attention=sas(exchange="gather"),
        parallel={"tensor": 2, "sequence": True, "context": 2, "pipeline": 2},
        data={"sequence_length": 16},
        model={**BIASED, "num_layers": 6, "tie_embeddings": True},
        training={"recompute": "selective", "recompute_modules": ["simulation"], "global_batch_size": 8},
        optimizer=SHARDED,
    )
    T, H, F, V, N, G, D, E, r, k = 16, 20, 28, 48, 4, 4, 6, 10, 2, 3
    layers, m, a, g = 3, 2, 4, 4  # per stage; microbatches; bytes of an activation and of a gradient
    agreed = 4 * 8  # numbers that two ranks sum in float64
    columns = (N + 2 * G) * D
    heads = k * r * (N * (N + r * N) + 2 * G * (G + r * G)) + 2 * r * (N + 2 * G)
    features = 2 * (D * E + E * E + 2 * E)
    first, last = (count_communication_bytes(config, world_size=16, stage=stage) for stage in (0, 1))
    assert first["tensor"] == {
        # T·H/2 each for the all-gather, its repetition for the weight's gradient, and the reduce-scatter.
        "qkv": layers * m * 3 * T * H * a // 2,
        "projection": layers * (m * 2 * T * H * a // 2 + H * g),
        "mlp": layers * (m * 5 * T * H * a // 2 + H * g),
        "embedding": m * 2 * T * H * a // 2,
        "norms": layers * 4 * H * g,
        "head_simulation": layers * m * (2 * T * columns * a // 2 + heads * g),
        "feature_simulation": layers * m * features * g,
        "recompute": layers * m * T * columns * a // 2,
        "bookkeeping": agreed,
    }
    assert last["tensor"] == {
        **{name: count for name, count in first["tensor"].items() if name != "embedding"},
        "norms": (layers * 4 + 2) * H * g,
        "head": m * (3 * T * H * a // 2 + 3 * T * 4),
    }
    # A rank's r·N/2 query and r·G/2 key and value heads, and the average of the result over the blocks.
    exchanged = (r * (N + G) * E + r * G * D + N * D) // 2
    assert first["context"] == {"context_exchange": layers * m * 2 * T * exchanged * a // 2}
    assert first["pipeline"] == {"activations": m * T // 2 * H * a, "bookkeeping": 2 + agreed}
    elements = first["data"]["gradients"] // 3
    weights = layers * (H * columns + N * D * H + 2 * F * H + columns + F) // 2 + V * H // 2
    weights += layers * (2 * H + 4 * H + heads + features)
    assert weights < elements < weights + 64 * layers * 34 + 2 * 128
    assert first["data"] == {
        "gradients": 3 * elements,
        "parameters": 3 * elements,
        "bookkeeping": 6 + agreed * 3 // 2,
    }
    assert (
        first["other"]
        == last["other"]
        == {"embedding": V * H // 2 * g, "bookkeeping": round(2 * 15 / 16 * 4)}
    )


class OutsideConfig(AttentionConfig):
    """A variant from outside the package, with the default costs."""

    kind: str = "outside"


def test_a_variant_with_default_costs_sends_the_same_as_plain_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = VariantNames("", "sas_megatron.costs.attention:AttentionCosts", "")
    monkeypatch.setitem(KINDS, "outside", names)
    plain = small_config(
        attention={"kind": "gqa", "num_heads": 4, "num_kv_heads": 1, "head_dim": 6},
        parallel={"tensor": 2, "context": 2},
        model=BIASED,
    )
    outside = plain.model_copy(update={"attention": OutsideConfig(num_heads=4, num_kv_heads=1, head_dim=6)})
    assert count_communication_bytes(outside, world_size=8) == count_communication_bytes(plain, world_size=8)


def test_runs_that_cannot_be_counted_are_rejected() -> None:
    config = small_config(parallel={"pipeline": 2})
    with pytest.raises(FieldError, match=r"stage=2: must be one of parallel\.pipeline=2; use 0 to 1"):
        count_communication_bytes(config, world_size=2, stage=2)
    with pytest.raises(FieldError, match="world size=3: must be a multiple of 2"):
        count_communication_bytes(config, world_size=3)
    with pytest.raises(FieldError, match=r"training\.engine=deepspeed: .*; .*logging\.communication_counter"):
        count_communication_bytes(small_config(training={"engine": "deepspeed"}), world_size=1)
