"""FLOPs of a model by term, from its config alone. No torch.

Conventions of every printed figure:

- A multiply-add is two FLOPs, and the backward pass of a term is twice its forward pass.
- Scores and values are counted for all S² pairs of tokens. `causal_half` counts the causal half, which
  fused implementations compute. Boundaries of documents, which depend on the data, are not considered.
- In a layer with a window of W < S keys they are counted for S·W pairs, in terms of their own, such as
  `scores_window_512`. The causal half of these has W keys for each token but the first W-1, which have fewer.
- The output layer is counted over the padded vocabulary; the embedding look-up is free.
  `without_embeddings` (in `costs.parameters`) excludes both tables.
- Norms, activation functions, softmax and other element-wise operations are not counted.

Training FLOPs are model FLOPs, as in model FLOPs utilization. Recomputation, and computation on padding, is
counted by `count_recompute_flops` and `count_padding_flops`; the sum of all three is the number of executed
FLOPs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.attention_backend import (
    PADDING,
    RECOMPUTING,
    Backend,
    Device,
    resolve_backend,
)
from sas_megatron.costs.output_loss import resolve_output_loss

# Forward plus backward over forward: the gradients of inputs and of weights cost one forward pass each.
TRAINING_FACTOR = 3
# Terms of which a causal implementation computes about half.
CAUSAL_TERMS = ("scores", "values")
_WINDOW_TERM = re.compile(rf"(?:{'|'.join(CAUSAL_TERMS)})_window_(\d+)")

# Layers by their number, which counts from 1 over all pipeline stages.
Layers = Sequence[int]


def count_forward_flops(config: RunConfig, *, sequence_length: int | None = None) -> dict[str, int]:
    """Return the forward FLOPs of one token by term.

    Args:
        config: The run.
        sequence_length: Number of tokens; None for that of the config.
    """
    layer = _count_layer_flops(config, sequence_length)
    terms = _sum_layers(config, layer, dict.fromkeys(layer, _all_layers(config)), sequence_length)
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
    every = _all_layers(config)
    again: dict[str, list[int]] = {name: list(_recomputed_layers(config)) for name in layer}
    for module in config.recomputed_modules:
        for name in {**config.attention.recomputable, "mlp": ("mlp",)}[module]:
            again[name] = list(every)
    recomputing = _layers_with(RECOMPUTING, config, device=device, sequence_length=sequence_length)
    again["scores"] += recomputing
    repeated = build_attention_costs(config.attention).count_repeated_flops(
        device=device, element_bytes=config.training.element_bytes
    )
    counted = Counter(_sum_layers(config, layer, again, sequence_length))
    counted.update({name: config.model.num_layers * count for name, count in repeated.items()})
    if resolve_output_loss(config) == "chunked":
        counted["head"] = _count_head_flops(config)
    return {name: count for name, count in counted.items() if count}


def count_padding_flops(
    config: RunConfig, *, device: Device, sequence_length: int | None = None
) -> dict[str, int]:
    """Return the FLOPs of one token on zeros that pad values to the width of keys, recomputation included.

    torch's fused attention requires equal widths. The only terms are `values`, without and within a window;
    without padding there are none.

    Args:
        config: The run.
        device: The device, which decides the implementation.
        sequence_length: Number of tokens; None for that of the config.
    """
    attention = config.attention
    padding = attention.query_key_dim - attention.value_width
    every = _layers_with(PADDING, config, device=device, sequence_length=sequence_length)
    if not padding or not every:
        return {}
    again = every if "attention" in config.recomputed_modules else _recomputed_layers(config)
    padded = [*TRAINING_FACTOR * every, *(number for number in again if number in every)]
    values = _count_layer_flops(config, sequence_length)["values"] * padding // attention.value_width
    return _sum_layers(config, {"values": values}, {"values": padded}, sequence_length)


def causal_half(flops: Mapping[str, float], *, sequence_length: int) -> dict[str, float]:
    """Return the terms if token t attends to the first t of S tokens, which are (S + 1)/2 on average.

    In a window of W keys, token t attends to min(t, W) tokens, of which W are counted in full.
    """
    halved = {}
    for name, count in flops.items():
        window = sequence_length if name in CAUSAL_TERMS else None
        if (found := _WINDOW_TERM.fullmatch(name)) is not None:
            window = int(found[1])
        fraction = 1.0 if window is None else (2 * sequence_length - window + 1) / (2 * sequence_length)
        halved[name] = count * fraction
    return halved


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


def _sum_layers(
    config: RunConfig, layer: Mapping[str, int], layers: Mapping[str, Layers], sequence_length: int | None
) -> dict[str, int]:
    """Return the sum of a layer's terms over layers; those within windows are terms of their own.

    Args:
        config: The run.
        layer: The FLOPs of one token in a layer without a window.
        layers: The layers of each term.
        sequence_length: Number of tokens; None for that of the config.
    """
    attention, length = config.attention, sequence_length or config.data.sequence_length
    if attention.window_size is None or attention.window_size >= length:
        return {name: len(layers[name]) * count for name, count in layer.items()}
    terms: dict[str, int] = {}
    for name, count in layer.items():
        windows = [attention.window_of_layer(number) for number in layers[name]]
        num_full = windows.count(None) if name in CAUSAL_TERMS else len(windows)
        terms[name] = num_full * count
        if num_full < len(windows):
            # Each of S keys costs the same.
            within = count * attention.window_size // length
            terms[f"{name}_window_{attention.window_size}"] = (len(windows) - num_full) * within
    return terms


def _layers_with(
    backends: tuple[Backend, ...], config: RunConfig, *, device: Device, sequence_length: int | None
) -> list[int]:
    """Return the layers whose core attention has one of the implementations on a device."""
    attention = config.attention
    chosen = {
        window: resolve_backend(config, device=device, sequence_length=sequence_length, window=window)
        for window in (attention.window_size, None)
    }
    return [number for number in _all_layers(config) if chosen[attention.window_of_layer(number)] in backends]


def _all_layers(config: RunConfig) -> Layers:
    return range(1, config.model.num_layers + 1)


def _count_head_flops(config: RunConfig) -> int:
    return 2 * config.model.hidden_size * config.model.padded_vocab_size


def _recomputed_layers(config: RunConfig) -> Layers:
    """Return the layers, over all stages, that are recomputed from their input."""
    training, parallel = config.training, config.parallel
    if training.recompute != "full":
        return ()
    if training.recompute_layers is None:
        return _all_layers(config)
    return [
        number
        for stage in range(parallel.pipeline)
        for chunk in range(parallel.virtual_pipeline)
        for number in parallel.layers_of_chunk(config.model.num_layers, stage, chunk)[
            : training.recompute_layers
        ]
    ]
