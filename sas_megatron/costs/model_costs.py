"""What a model costs, from its config alone: parameters and FLOPs as named terms that sum. No torch.

Conventions, which every printed figure follows: a multiply-add is two FLOPs; scores and values are
counted in full (S², not the causal half that fused back ends skip; `causal_half` gives that); the
backward pass is twice the forward one, in each term; the embedding look-up costs nothing, the output
layer's product counts, over the padded vocabulary (`without_embeddings` leaves out both tables); norms,
activations, softmax and other element-wise work are left out.

Training FLOPs are the model's: what is computed a second time, or on padding, to save memory or to suit
a kernel, is no part of them nor of model FLOPs utilization. `count_recompute_flops` and
`count_padding_flops` count that: with them, the FLOPs that are executed.
"""

from __future__ import annotations

from sas_megatron.config.attention_backend import RECOMPUTING, Device
from sas_megatron.config.run import RunConfig
from sas_megatron.config.tensor_group import count_by_term
from sas_megatron.costs.resolved_backend import resolve_backend
from sas_megatron.costs.weights import mlp_weights, norm_weights, table_weight

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
    layer = _count_layer_flops(config, sequence_length)
    terms = {name: model.num_layers * count for name, count in layer.items()}
    terms["head"] = 2 * model.hidden_size * model.padded_vocab_size
    return terms


def count_training_flops(config: RunConfig, *, sequence_length: int | None = None) -> dict[str, int]:
    """Forward and backward FLOPs of one token by term, nothing that is computed again among them."""
    forward = count_forward_flops(config, sequence_length=sequence_length)
    return {name: TRAINING_FACTOR * count for name, count in forward.items()}


def count_recompute_flops(
    config: RunConfig, *, device: Device, sequence_length: int | None = None
) -> dict[str, int]:
    """FLOPs of one token that the backward pass spends on computing again what was not kept, by term.

    What `training.recompute` names, forward once more; with the fused back end the scores, which its
    backward pass makes anew in every layer; and what kernels of the attention's own compute again. The
    device decides which of them run.
    """
    layer = _count_layer_flops(config, sequence_length)
    times = dict.fromkeys(layer, _count_layers_in_full(config))
    for module in config.recomputed_modules:
        for name in {**config.attention.recomputable, "mlp": ("mlp",)}[module]:
            times[name] = config.model.num_layers
    if resolve_backend(config, device=device, sequence_length=sequence_length) in RECOMPUTING:
        times["scores"] += config.model.num_layers
    repeated = config.attention.count_repeated_flops(
        device=device, element_bytes=config.training.element_bytes
    )
    counted = {
        name: times[name] * count + config.model.num_layers * repeated.get(name, 0)
        for name, count in layer.items()
    }
    return {name: count for name, count in counted.items() if count}


def count_padding_flops(
    config: RunConfig, *, device: Device, sequence_length: int | None = None
) -> dict[str, int]:
    """FLOPs of one token, forward, backward and again, on the zeros that widen values to the keys' width.

    torch's fused attention wants equal widths. The term is `values`, or there is none.
    """
    attention, num_layers = config.attention, config.model.num_layers
    backend = resolve_backend(config, device=device, sequence_length=sequence_length)
    padding = attention.query_key_dim - attention.value_width
    if backend not in ("fused", "composed") or not padding:
        return {}
    recomputed = num_layers if "attention" in config.recomputed_modules else _count_layers_in_full(config)
    values = _count_layer_flops(config, sequence_length)["values"] * padding // attention.value_width
    return {"values": (TRAINING_FACTOR * num_layers + recomputed) * values}


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


def _count_layer_flops(config: RunConfig, sequence_length: int | None) -> dict[str, int]:
    """Forward FLOPs of one token in one layer by term."""
    model = config.model
    length = sequence_length or config.data.sequence_length
    products = model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    return {
        **config.attention.count_forward_flops(model.hidden_size, sequence_length=length),
        "mlp": 2 * model.hidden_size * products,
    }


def _count_layers_in_full(config: RunConfig) -> int:
    """Layers, of all stages, of which no more than the input is kept."""
    training, parallel = config.training, config.parallel
    if training.recompute != "full":
        return 0
    if training.recompute_layers is None:
        return config.model.num_layers
    return training.recompute_layers * parallel.pipeline * parallel.virtual_pipeline
