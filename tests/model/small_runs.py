"""Small runs of every attention kind, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from sas_megatron.config.attention import resolve_kind
from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config

KINDS = ("mha", "gqa", "mqa", "diff", "mla", "tpa", "mfa", "sas", "sas", "sas")


def sweep(max_examples: int) -> settings:
    """Return settings with the same examples in each run, so that failures are reproducible."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def modified_attentions(draw: st.DrawFn, *, backends: tuple[str, ...] = ("unfused",)) -> dict[str, Any]:
    """Draw an attention, every second one with random modifiers."""
    attention: dict[str, Any] = draw(attentions(backends=backends))
    if draw(st.booleans()):
        return attention
    switches = {name: draw(st.booleans()) for name in ("qk_norm", "knocking_heads", "output_norm")}
    return {
        **attention,
        **switches,
        "output_gate": draw(st.sampled_from(["none", "headwise", "elementwise"])),
    }


@st.composite
def attentions(draw: st.DrawFn, *, backends: tuple[str, ...] = ("unfused",)) -> dict[str, Any]:
    kind = draw(st.sampled_from(KINDS))
    num_kv_heads, readers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    attention: dict[str, Any] = {
        "kind": kind,
        "num_heads": num_kv_heads * readers,
        "head_dim": head_dim,
        "backend": draw(st.sampled_from(backends)),
        "rotary": draw(st.sampled_from(["after", "after", "none", *(["before"] if kind == "sas" else [])])),
    }
    if kind == "mla":
        rotary_head_dim = 2 * draw(st.integers(1, 3))
        return {
            **attention,
            "rotary_head_dim": rotary_head_dim,
            "value_head_dim": draw(st.none() | st.integers(1, head_dim + rotary_head_dim)),
            "kv_lora_rank": draw(st.integers(1, 9)),
            "query_lora_rank": draw(st.none() | st.integers(1, 9)),
        }
    if kind in ("gqa", "diff", "sas"):
        attention["num_kv_heads"] = num_kv_heads
    if kind == "mfa":
        most = attention["num_heads"] * head_dim
        return {**attention, "query_rank": draw(st.integers(1, most))}
    if kind == "tpa":
        attention["factorize_query"] = draw(st.booleans())
        if attention["factorize_query"]:
            attention["query_rank"] = draw(st.sampled_from([None, 1, 5]))
        return {**attention, "key_rank": draw(st.integers(1, 3)), "value_rank": draw(st.integers(1, 3))}
    return {**attention, **(draw(_simulations(head_dim)) if kind == "sas" else {})}


@st.composite
def _simulations(draw: st.DrawFn, head_dim: int) -> dict[str, Any]:
    switches = ("query_heads", "key_heads", "value_heads", "features")
    simulation: dict[str, Any] = {f"simulate_{switch}": draw(st.booleans()) for switch in switches}
    simulation["simulation_bias"] = draw(st.booleans())
    for activation in ("head_activation", "feature_activation"):
        simulation[activation] = draw(st.sampled_from(["relu", "gelu", "none"]))
    simulation["aggregation"] = draw(st.sampled_from(["mean", "rsqrt"]))
    simulation["head_expansion"] = draw(st.integers(1, 3))
    simulation["kernel_size"] = draw(st.sampled_from([1, 3, 5]))
    simulation["exchange"] = draw(st.sampled_from(["auto", "gather", "all_to_all"]))
    if simulation["simulate_features"]:
        widths = st.sampled_from([None, head_dim, head_dim + 2, head_dim + 6])
        simulation["simulated_head_dim"] = draw(widths)
    return simulation


@st.composite
def models(draw: st.DrawFn, *, most_layers: int = 3) -> dict[str, Any]:
    return {
        "num_layers": draw(st.integers(1, most_layers)),
        "hidden_size": draw(st.integers(3, 17)),
        "ffn_hidden_size": draw(st.integers(1, 19)),
        "vocab_size": draw(st.integers(1, 40)),
        "vocab_multiple": draw(st.integers(1, 9)),
        "activation": draw(st.sampled_from(["swiglu", "gelu"])),
        "normalization": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "linear_bias": draw(st.booleans()),
        "parallel_residual": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
    }


@st.composite
def bias_of_queries(draw: st.DrawFn, attention: dict[str, Any], *, linear_bias: bool) -> dict[str, Any]:
    """Draw `qkv_bias`, if the kind supports it and no other field adds these biases."""
    if linear_bias or not resolve_kind(attention["kind"]).supports_qkv_bias:
        return {}
    return {"qkv_bias": draw(st.booleans())}


@st.composite
def recomputations(draw: st.DrawFn, *, kind: str, num_layers: int) -> dict[str, Any]:
    recompute = draw(st.sampled_from(["none", "selective", "full"]))
    if recompute == "full":
        layers = draw(st.none() | st.integers(1, num_layers))
        return {"recompute": recompute, "recompute_layers": layers}
    if recompute == "none":
        return {}
    names = st.sampled_from(["attention", "mlp", *(["simulation"] if kind == "sas" else [])])
    return {"recompute": recompute, "recompute_modules": draw(st.none() | st.lists(names, min_size=1))}


@st.composite
def small_runs(draw: st.DrawFn) -> RunConfig:
    """Draw a run in one process, with unfused attention and any recomputation."""
    attention, model = draw(modified_attentions()), draw(models())
    attention |= draw(bias_of_queries(attention, linear_bias=model["linear_bias"]))
    recomputation = draw(recomputations(kind=attention["kind"], num_layers=model["num_layers"]))
    return small_config(
        attention=attention,
        model=model,
        data={"sequence_length": draw(st.integers(1, 9))},
        training=recomputation,
    )


@st.composite
def shared_runs(draw: st.DrawFn) -> RunConfig:
    """Draw a run on up to eight ranks per layer, with any backend and precision, with or without dropout."""
    attention = draw(modified_attentions(backends=("unfused", "fused", "auto")))
    model = draw(models(most_layers=2))
    attention |= draw(bias_of_queries(attention, linear_bias=model["linear_bias"]))
    tensor, context = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    attention["dropout"] = draw(st.sampled_from([0.0, 0.0, 0.0, 0.1]))
    model["hidden_dropout"] = draw(st.sampled_from([0.0, 0.0, 0.1]))
    for width in ("ffn_hidden_size", "vocab_multiple"):
        model[width] *= tensor
    model["output_loss"] = draw(st.sampled_from(["auto", "chunked"]))
    recomputation = draw(recomputations(kind=attention["kind"], num_layers=model["num_layers"]))
    micro_batch_size = draw(st.integers(1, 3))
    sections: dict[str, Any] = {
        "attention": attention,
        "model": model,
        "parallel": {
            "tensor": tensor,
            "context": context,
            "sequence": tensor > 1 and draw(st.booleans()),
        },
        "data": {
            "sequence_length": draw(st.sampled_from([8, 16, 72, 136])),
            "reset_at_document_ends": draw(st.sampled_from([False, False, False, True])),
        },
        "training": {
            "micro_batch_size": micro_batch_size,
            "global_batch_size": 2 * micro_batch_size,
            "precision": draw(st.sampled_from(["float32", "float32", "bfloat16"])),
            **recomputation,
        },
    }
    try:
        return small_config(**sections)
    except UserError:
        # The heads cannot be sharded over these ranks.
        assume(False)
        raise
