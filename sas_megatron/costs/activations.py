"""Bytes that a rank keeps: activations for the backward pass, keys and values for decoding. No torch.

Activations are the tensors that autograd saves between a microbatch's forward and backward pass. Each is
counted once, in the term of the operation that saves it first:

    embedding      which tokens are in this tensor rank's part of the table; the dropout mask
    norms          the inputs and statistics of a layer's two norms, and of the final norm
    qkv, …         the attention's terms (`AttentionCosts.count_activation_bytes`)
    mlp            the input, and the tensors that the activation function reads and writes
    residual       the dropout masks of the residual branches
    layer_inputs   the inputs of layers that are recomputed entirely
    head           the output layer's input, and the probabilities over the rank's part of the vocabulary, or,
                   if the loss is chunked, the log-sum-exp of each token

Three kinds of memory are not counted: tensors that a pass allocates and frees again (gradients included), the
sequence-parallel buffer and the rotary table, which a model has once, and saved states of random generators.

On a CPU, every term equals, to the byte, the memory that torch 2.13 saves on the first tensor rank (see
tests/model). On a GPU it is not measured: fused norms, dropout and a biased MLP's activation function are
counted by definition, and core attention as its CPU kernel, without the padding or fallbacks that a GPU
kernel may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activation_spec import FLOAT32_BYTES, ActivationSpec
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.attention_backend import Device, resolve_backend
from sas_megatron.costs.head_sharding import count_attended_heads, count_local_heads
from sas_megatron.costs.output_loss import (
    count_probability_bytes,
    is_loss_blocked,
    resolve_output_loss,
)

# Bytes of a token id, and of an element of a boolean mask.
INDEX_BYTES, MASK_BYTES = 8, 1

Terms = dict[str, int]


def count_activation_bytes(config: RunConfig, *, device: Device, stage: int = 0) -> Terms:
    """Return the bytes that a rank saves of one microbatch, in all model chunks of a pipeline stage.

    Args:
        config: The run.
        device: The device, which decides the implementation of core attention and what is fused.
        stage: The pipeline stage.

    Raises:
        FieldError: The stage does not exist.
    """
    return _sum_terms(_count_chunks(config, device, stage))


def count_peak_activation_bytes(
    config: RunConfig, *, device: Device, num_microbatches: int, stage: int = 0
) -> Terms:
    """Return the largest number of bytes that a rank of a pipeline stage saves during an optimizer step.

    It is reached when the 1F1B schedule, plain or interleaved, has the most microbatches in flight.

    Args:
        config: The run.
        device: The device, which decides the implementation of core attention and what is fused.
        num_microbatches: Microbatches of a step on each data rank.
        stage: The pipeline stage.

    Raises:
        FieldError: The stage does not exist.
    """
    chunks = _count_chunks(config, device, stage)
    sizes = [sum(terms.values()) for terms in chunks]
    # From the first backward pass on, the numbers repeat with each round of microbatches.
    distinct_microbatches = 4 * config.parallel.pipeline
    peak = max(
        microbatches_in_flight(
            config, num_microbatches=min(num_microbatches, distinct_microbatches), stage=stage
        ),
        key=lambda counts: sum(count * size for count, size in zip(counts, sizes, strict=True)),
    )
    return _sum_terms(
        {name: count * size for name, size in terms.items()}
        for count, terms in zip(peak, chunks, strict=True)
    )


def microbatches_in_flight(
    config: RunConfig, *, num_microbatches: int, stage: int = 0
) -> Iterator[tuple[int, ...]]:
    """Yield, after each forward pass of a step, the microbatches in flight in each model chunk of a stage.

    A microbatch is in flight between its forward and its backward pass. In Megatron-core's 1F1B schedule, a
    stage is ahead of its first backward pass by the number of later stages. The interleaved schedule runs
    the microbatches in rounds of p, the number of stages, with all model chunks of a round in order; a stage
    is ahead by (v-1)·p chunks and twice the number of later stages, and runs backward in reverse order.

    Args:
        config: The run.
        num_microbatches: Microbatches of a step on each data rank.
        stage: The pipeline stage.
    """
    stages, num_chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    round_size = config.parallel.microbatch_group_size
    later = stages - 1 - stage
    ahead = later if num_chunks == 1 else 2 * later + (num_chunks - 1) * stages
    in_flight = [0] * num_chunks
    for done in range(num_microbatches * num_chunks):
        in_flight[done // round_size % num_chunks] += 1
        yield tuple(in_flight)
        if done >= ahead:
            in_flight[num_chunks - 1 - (done - ahead) // round_size % num_chunks] -= 1


def count_kv_cache_bytes(config: RunConfig, *, element_bytes: int = 2) -> Terms:
    """Return the bytes that decoding caches per token in all layers, by term."""
    elements = build_attention_costs(config.attention).count_kv_cache_elements()
    return {name: config.model.num_layers * element_bytes * count for name, count in elements.items()}


def _count_chunks(config: RunConfig, device: Device, stage: int) -> list[Terms]:
    """Return the bytes saved of one microbatch for each model chunk of a stage."""
    config.parallel.check_stage(stage)
    spec = _activation_spec(config, device)
    return [
        _count_chunk(config, spec, stage=stage, chunk=chunk)
        for chunk in range(config.parallel.virtual_pipeline)
    ]


def _count_chunk(config: RunConfig, spec: ActivationSpec, *, stage: int, chunk: int) -> Terms:
    parallel, model = config.parallel, config.model
    num_layers = parallel.layers_of_stages(model.num_layers)[stage] // parallel.virtual_pipeline
    num_recomputed = 0
    if config.training.recompute == "full":
        num_recomputed = config.training.recompute_layers or num_layers
    is_first = stage == 0 and chunk == 0
    is_last = stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1
    layer = _count_layer(config, spec)
    terms = _sum_terms(
        [
            {"embedding": _count_embedding(config, spec) if is_first else 0},
            {name: (num_layers - num_recomputed) * size for name, size in layer.items()},
            {"layer_inputs": num_recomputed * spec.local_bytes(model.hidden_size)},
            _count_head(config, spec) if is_last else {},
        ]
    )
    return {name: size for name, size in terms.items() if size}


def _activation_spec(config: RunConfig, device: Device) -> ActivationSpec:
    attention, parallel = config.attention, config.parallel
    return ActivationSpec(
        batch=config.training.micro_batch_size,
        length=config.data.sequence_length,
        tensor=parallel.tensor,
        context=parallel.context,
        sequence=parallel.sequence,
        element_bytes=config.training.element_bytes,
        device=device,
        backend=resolve_backend(config, device=device),
        masked=config.data.reset_at_document_ends,
        recomputed=frozenset(config.recomputed_modules),
        heads=count_local_heads(attention, tensor=parallel.tensor),
        attended_heads=count_attended_heads(attention, tensor=parallel.tensor, context=parallel.context),
        num_blocks=attention.num_blocks,
    )


def _count_layer(config: RunConfig, spec: ActivationSpec) -> Terms:
    model = config.model
    attention = build_attention_costs(config.attention)
    return {
        "norms": _count_norms(config, spec),
        **attention.count_activation_bytes(model.hidden_size, spec),
        "mlp": _count_mlp(config, spec),
        "residual": 2 * _count_hidden_dropout(config, spec),
    }


def _count_norms(config: RunConfig, spec: ActivationSpec) -> int:
    """Return the bytes of both norms of a layer, which with parallel residual branches read one tensor."""
    model = config.model
    first = spec.norm_bytes(model.hidden_size, model.normalization)
    if not model.parallel_residual:
        return 2 * first
    return first + spec.norm_bytes(model.hidden_size, model.normalization, input_width=0)


def _count_hidden_dropout(config: RunConfig, spec: ActivationSpec) -> int:
    model = config.model
    if model.hidden_dropout == 0.0:
        return 0
    return spec.dropout_mask_bytes(spec.local_tokens * model.hidden_size)


def _count_mlp(config: RunConfig, spec: ActivationSpec) -> int:
    """Return the bytes of the input, and of the tensors that the activation function saves.

    For gelu and gelu_tanh, these are its input and its result. For swiglu, they are both halves of the first
    product, the activated gate, the other half, and the result; the fused swiglu on a GPU saves the halves
    and the result.
    """
    model = config.model
    saved = spec.local_bytes(model.hidden_size)
    if "mlp" in spec.recomputed:
        return saved
    widths = {"gelu": 2, "gelu_tanh": 2, "swiglu": 3 if spec.device == "gpu" else 5}[model.activation]
    return saved + spec.full_bytes(widths * model.ffn_hidden_size // spec.tensor)


def _count_embedding(config: RunConfig, spec: ActivationSpec) -> int:
    """Return the bytes of indices and masks of a sharded table; a single rank saves only batch tensors."""
    indices = spec.tokens * (INDEX_BYTES + MASK_BYTES) if spec.tensor > 1 else 0
    return _count_hidden_dropout(config, spec) + indices


def _count_head(config: RunConfig, spec: ActivationSpec) -> Terms:
    """Return the final norm's bytes, the output layer's input, and what the loss saves.

    The full loss saves float32 probabilities, and unless it is computed in blocks, positions of labels; the
    chunked loss saves one float32 number per token.
    """
    model = config.model
    saved = FLOAT32_BYTES * spec.tokens
    if resolve_output_loss(config) == "full":
        saved = count_probability_bytes(config) + spec.tokens * (INDEX_BYTES + MASK_BYTES)
    if is_loss_blocked(config, device=spec.device):
        saved = count_probability_bytes(config)
    return {
        "norms": spec.norm_bytes(model.hidden_size, model.normalization),
        "head": spec.local_bytes(model.hidden_size) + saved,
    }


def _sum_terms(parts: Iterable[Terms]) -> Terms:
    total: Terms = {}
    for terms in parts:
        for name, size in terms.items():
            total[name] = total.get(name, 0) + size
    return total
