"""FLOPs of a model by term, from its config alone. No torch.

Conventions of every printed figure:

- A multiply-add is two FLOPs, and the backward pass of a term is twice its forward pass.
- Scores and values are counted for all S² pairs of tokens. `causal_half` counts the causal half, which
  fused implementations compute.
- The output layer is counted over the padded vocabulary; the embedding look-up is free.
  `without_embeddings` (in `costs.parameters`) excludes both tables.
- Norms, activation functions, softmax and other element-wise operations are not counted.

Training FLOPs are model FLOPs, as in model FLOPs utilization. Recomputation, and computation on padding, is
counted by `count_recompute_flops` and `count_padding_flops`; the sum of all three is the number of executed
FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.attention_backend import RECOMPUTING, Device, resolve_backend
from sas_megatron.costs.output_loss import resolve_output_loss

# Forward plus backward over forward: the gradients of inputs and of weights cost one forward pass each.
TRAINING_FACTOR = 3
# Terms of which a causal implementation computes about half.
CAUSAL_TERMS = ("scores", "values")


def count_forward_flops(config: RunConfig, *, sequence_length: int | None = None) -> dict[str, int]:
    """Return the forward FLOPs of one token by term.

    Args:
        config: The run.
        sequence_length: Number of tokens; None for that of the config.
    """
    model = config.model
    layer = _count_layer_flops(config, sequence_length)
    terms = {name: model.num_layers * count for name, count in layer.items()}
    terms["head"] = _count_head_flops(config)
    return terms


def count_training_flops(config: RunConfig, *, sequence_length: int | None = None) -> dict[str, int]:
    """Return the forward and backward FLOPs of one token by term, without recomputation."""
    forward = count_forward_flops(config, sequence_length=sequence_length)
    return {name: TRAINING_FACTOR * count for name, count in forward.items()}


def count_recompute_flops(
    config: RunConfig, *, device: Device, sequence_length: int | None = None
) -> dict[str, int]:
    """Return the FLOPs of one token that the backward pass spends on recomputation, by term.

    Counted are the parts that `training.recompute` names, the scores that fused core attention recomputes,
    recomputation in the kernels of the attention variant, and the logits that the chunked loss recomputes.

    Args:
        config: The run.
        device: The device, which decides the implementations.
        sequence_length: Number of tokens; None for that of the config.
    """
    layer = _count_layer_flops(config, sequence_length)
    times = dict.fromkeys(layer, _count_recomputed_layers(config))
    for module in config.recomputed_modules:
        for name in {**config.attention.recomputable, "mlp": ("mlp",)}[module]:
            times[name] = config.model.num_layers
    if resolve_backend(config, device=device, sequence_length=sequence_length) in RECOMPUTING:
        times["scores"] += config.model.num_layers
    repeated = build_attention_costs(config.attention).count_repeated_flops(
        device=device, element_bytes=config.training.element_bytes
    )
    counted = {
        name: times[name] * count + config.model.num_layers * repeated.get(name, 0)
        for name, count in layer.items()
    }
    if resolve_output_loss(config) == "chunked":
        counted["head"] = _count_head_flops(config)
    return {name: count for name, count in counted.items() if count}


def count_padding_flops(
    config: RunConfig, *, device: Device, sequence_length: int | None = None
) -> dict[str, int]:
    """Return the FLOPs of one token on zeros that pad values to the width of keys, recomputation included.

    torch's fused attention requires equal widths. The only term is `values`; without padding there is none.

    Args:
        config: The run.
        device: The device, which decides the implementation.
        sequence_length: Number of tokens; None for that of the config.
    """
    attention, num_layers = config.attention, config.model.num_layers
    backend = resolve_backend(config, device=device, sequence_length=sequence_length)
    padding = attention.query_key_dim - attention.value_width
    if backend not in ("fused", "composed") or not padding:
        return {}
    recomputed = num_layers if "attention" in config.recomputed_modules else _count_recomputed_layers(config)
    values = _count_layer_flops(config, sequence_length)["values"] * padding // attention.value_width
    return {"values": (TRAINING_FACTOR * num_layers + recomputed) * values}


def causal_half(flops: Mapping[str, float], *, sequence_length: int) -> dict[str, float]:
    """Return the terms if token t attends to the first t of S tokens, which are (S + 1)/2 on average."""
    fraction = (sequence_length + 1) / (2 * sequence_length)
    return {name: count * (fraction if name in CAUSAL_TERMS else 1.0) for name, count in flops.items()}


def _count_layer_flops(config: RunConfig, sequence_length: int | None) -> dict[str, int]:
    """Return the forward FLOPs of one token in one layer by term."""
    model = config.model
    length = sequence_length or config.data.sequence_length
    products = model.ffn_hidden_size * (3 if model.activation == "swiglu" else 2)
    attention = build_attention_costs(config.attention)
    return {
        **attention.count_forward_flops(model.hidden_size, sequence_length=length),
        "mlp": 2 * model.hidden_size * products,
    }


def _count_head_flops(config: RunConfig) -> int:
    return 2 * config.model.hidden_size * config.model.padded_vocab_size


def _count_recomputed_layers(config: RunConfig) -> int:
    """Return the number of layers, over all stages, that are recomputed from their input."""
    training, parallel = config.training, config.parallel
    if training.recompute != "full":
        return 0
    if training.recompute_layers is None:
        return config.model.num_layers
    return training.recompute_layers * parallel.pipeline * parallel.virtual_pipeline
