"""What a model costs, from its config alone: parameters and FLOPs as named terms that sum. No torch.

Conventions, which every printed figure follows: a multiply-add is two FLOPs; scores and values are
counted in full (S², not the causal half that fused back ends skip; `causal_half` gives that); the
backward pass is twice the forward one; the embedding look-up costs nothing, the output layer's product
counts, over the padded vocabulary (`without_embeddings` leaves out both tables); norms, activations,
softmax and other element-wise work are left out.
"""

from __future__ import annotations

from sas_megatron.config.run import RunConfig
from sas_megatron.config.tensor_group import count_by_term
from sas_megatron.model.weights import mlp_weights, norm_weights, table_weight

# Forward plus backward over forward: the gradients of inputs and of weights cost one forward each.
TRAINING_FACTOR = 3
# Of FLOPs: what a causal back end computes about half of.
CAUSAL_TERMS = ("scores", "values")
# Of parameters and FLOPs: the input and output tables, which scaling laws leave out or in.
EMBEDDING_TERMS = ("embedding", "head")


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of the whole model by term; they sum to those of the built model."""
    model = config.model
    table = table_weight(model, "embedding").elements
    attention = config.attention.count_parameters(model.hidden_size, linear_bias=model.linear_bias)
    of_layer = {**attention, **count_by_term(mlp_weights(model))}
    norm = count_by_term(norm_weights(model))["norms"]
    return {
        "embedding": table,
        **{name: model.num_layers * count for name, count in of_layer.items()},
        "norms": norm * (2 * model.num_layers + 1),
        "head": 0 if model.tie_embeddings else table,
    }


def count_forward_flops(config: RunConfig, *, sequence_length: int | None = None) -> dict[str, int]:
    """Forward FLOPs of one token by term, at the config's sequence length or another."""
    model = config.model
    length = sequence_length or config.data.sequence_length
    attention = config.attention.count_forward_flops(model.hidden_size, sequence_length=length)
    terms = {name: model.num_layers * count for name, count in attention.items()}
    products = model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    terms["mlp"] = model.num_layers * 2 * model.hidden_size * products
    terms["head"] = 2 * model.hidden_size * model.padded_vocab_size
    return terms


def count_training_flops(config: RunConfig, *, sequence_length: int | None = None) -> dict[str, int]:
    """Forward and backward FLOPs of one token by term."""
    forward = count_forward_flops(config, sequence_length=sequence_length)
    return {name: TRAINING_FACTOR * count for name, count in forward.items()}


def count_kv_cache_bytes(config: RunConfig, *, element_bytes: int = 2) -> dict[str, int]:
    """Bytes that decoding keeps of each token, in all layers, by term."""
    elements = config.attention.count_kv_cache_elements()
    return {name: config.model.num_layers * element_bytes * count for name, count in elements.items()}


def causal_half(flops: dict[str, int], *, sequence_length: int) -> dict[str, float]:
    """The same terms where token t attends to t tokens: (S + 1)/2 of S on average."""
    share = (sequence_length + 1) / (2 * sequence_length)
    return {name: count * (share if name in CAUSAL_TERMS else 1.0) for name, count in flops.items()}


def without_embeddings(terms: dict[str, int]) -> dict[str, int]:
    """The same terms but for those of the input and output tables."""
    return {name: count for name, count in terms.items() if name not in EMBEDDING_TERMS}
