"""Which weights the parts of the model hold, from its config alone. No torch."""

from __future__ import annotations

from sas_megatron.config.model import ModelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.config.tensor_group import Weight


def norm_weights(model: ModelConfig) -> list[Weight]:
    """Of one norm: the scale, and for LayerNorm the shift."""
    return [Weight("norms", model.hidden_size, partial_over="tokens")] * (
        2 if model.normalization == "layernorm" else 1
    )


def mlp_weights(model: ModelConfig) -> list[Weight]:
    """Of one layer: column parallel in, twice as wide for swiglu; row parallel out; each with its bias."""
    hidden, outer = model.hidden_size, model.ffn_hidden_size
    inner = outer * (2 if model.activation == "swiglu" else 1)
    into, out = (Weight("mlp", hidden * width, sharded=True) for width in (inner, outer))
    if not model.linear_bias:
        return [into, out]
    return [into, Weight("mlp", inner, sharded=True), out, Weight("mlp", hidden, partial_over="tokens")]


def table_weight(model: ModelConfig, term: str) -> Weight:
    """The input or output table, over the padded vocabulary."""
    return Weight(term, model.padded_vocab_size * model.hidden_size, sharded=True)


def layer_weights(config: RunConfig) -> list[Weight]:
    """Of one layer, in the order in which Megatron-core registers them."""
    model = config.model
    attention = config.attention.weights(model.hidden_size, linear_bias=model.linear_bias)
    # Its base class has the output projection before what a variant adds; `sorted` keeps the other order.
    registered = sorted(attention, key=lambda weight: weight.term != "projection")
    return [*norm_weights(model), *registered, *norm_weights(model), *mlp_weights(model)]


def chunk_weights(config: RunConfig, *, stage: int, piece: int) -> list[Weight]:
    """Of one piece of a pipeline stage, in the order in which Megatron-core registers them."""
    model, parallel = config.model, config.parallel
    last_stage, pieces = parallel.pipeline - 1, parallel.virtual_pipeline
    num_layers = parallel.layers_of_stages(model.num_layers)[stage] // pieces
    weights = layer_weights(config) * num_layers
    if (stage, piece) == (0, 0):
        weights = [table_weight(model, "embedding"), *weights]
    if (stage, piece) == (last_stage, pieces - 1):
        weights += norm_weights(model)
        # A single stage's tied table is the embedding's; the last of several keeps a copy.
        if not model.tie_embeddings or last_stage > 0:
            weights.append(table_weight(model, "head"))
    return weights
