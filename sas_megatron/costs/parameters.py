"""Weights of a model's parts, in Megatron-core's order of registration, and their number. No torch."""

from __future__ import annotations

from sas_megatron.config.model import ModelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.attention_modifiers import MODIFIER_TERMS
from sas_megatron.costs.tensor_traffic import Weight, sum_by_term

# Terms of the input and output embedding tables, which scaling laws may include or exclude.
EMBEDDING_TERMS = ("embedding", "head")


def norm_weights(model: ModelConfig) -> list[Weight]:
    """Return the weights of one norm: the scale, and for LayerNorm the shift."""
    return [Weight("norms", model.hidden_size, partial_over="tokens")] * (
        2 if model.normalization == "layernorm" else 1
    )


def mlp_weights(model: ModelConfig) -> list[Weight]:
    """Return the weights of an MLP: column-parallel (twice as wide for swiglu), then row-parallel."""
    hidden, outer = model.hidden_size, model.ffn_hidden_size
    inner = outer * (2 if model.activation == "swiglu" else 1)
    into, out = (Weight("mlp", hidden * width, sharded=True) for width in (inner, outer))
    if not model.linear_bias:
        return [into, out]
    return [into, Weight("mlp", inner, sharded=True), out, Weight("mlp", hidden, partial_over="tokens")]


def table_weight(model: ModelConfig, term: str) -> Weight:
    """Return the input or output embedding table, over the padded vocabulary."""
    return Weight(term, model.padded_vocab_size * model.hidden_size, sharded=True)


def layer_weights(config: RunConfig) -> list[Weight]:
    """Return the weights of one layer."""
    model = config.model
    costs = build_attention_costs(config.attention)
    attention = costs.weights(model.hidden_size, linear_bias=model.linear_bias)
    # Megatron-core's base class registers core attention, which holds the weights of modifiers, and the
    # output projection before a variant's own weights; `sorted` is stable and keeps the order of the others.
    first = {"projection": 1, **dict.fromkeys(MODIFIER_TERMS, 0)}
    registered = sorted(attention, key=lambda weight: first.get(weight.term, 2))
    return [*norm_weights(model), *registered, *norm_weights(model), *mlp_weights(model)]


def chunk_weights(config: RunConfig, *, stage: int, chunk: int) -> list[Weight]:
    """Return the weights of one model chunk of a pipeline stage."""
    model, parallel = config.model, config.parallel
    last_stage, num_chunks = parallel.pipeline - 1, parallel.virtual_pipeline
    num_layers = parallel.layers_of_stages(model.num_layers)[stage] // num_chunks
    weights = layer_weights(config) * num_layers
    if (stage, chunk) == (0, 0):
        weights = [table_weight(model, "embedding"), *weights]
    if (stage, chunk) == (last_stage, num_chunks - 1):
        weights += norm_weights(model)
        # With one stage, a tied table is the embedding's; with several, the last stage holds a copy.
        if not model.tie_embeddings or last_stage > 0:
            weights.append(table_weight(model, "head"))
    return weights


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Return the parameters of the full model by term; they sum to the built model's number."""
    model = config.model
    table = table_weight(model, "embedding").elements
    costs = build_attention_costs(config.attention)
    attention = costs.count_parameters(model.hidden_size, linear_bias=model.linear_bias)
    layer = {**attention, **sum_by_term(mlp_weights(model))}
    norm = sum_by_term(norm_weights(model))["norms"]
    return {
        "embedding": table,
        **{name: model.num_layers * count for name, count in layer.items()},
        "norms": norm * (2 * model.num_layers + 1),
        "head": 0 if model.tie_embeddings else table,
    }


def without_embeddings(terms: dict[str, int]) -> dict[str, int]:
    """Return parameters or FLOPs without the terms of the input and output embedding tables."""
    return {name: count for name, count in terms.items() if name not in EMBEDDING_TERMS}
