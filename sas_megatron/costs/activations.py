"""Bytes of activations that a rank keeps for its backward passes, from the config alone, by term. No torch.

Counted is what autograd holds from a microbatch's forward pass until its backward pass, each tensor once,
in the term of what keeps it first:

    embedding      which tokens are this tensor rank's; what dropout drew
    norms          a layer's two and the last stage's one: their inputs and statistics
    qkv, …         the attention's terms (`AttentionConfig.count_activation_bytes`)
    mlp            its input, and what its activation function reads and makes
    residual       what dropout drew on the residual branches
    layer_inputs   all that is kept of layers that are recomputed in full
    head           the output layer's input, and the probabilities of the rank's part of the vocabulary

Left out: what a pass allocates and frees again, gradients among it; the sequence-parallel buffer and the
table of rotary angles, which a model has once; states of random generators under recomputation.

On a CPU every term is what torch 2.13 keeps of the first tensor rank's pass, to the byte (tests/model). On
a GPU it is not measured: fused norms, dropout and a biased MLP's activation are counted by what they are
defined to keep, attention as the CPU's kernel, whatever padding or fallback a GPU's has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sas_megatron.attention.shared_heads import attended_heads, heads_of_tensor_rank
from sas_megatron.config.attention_backend import Device
from sas_megatron.config.layer_pass import FLOAT32_BYTES, ActivationSpec
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.resolved_backend import resolve_backend

# Of the numbers of tokens, and of a mask's elements.
INDEX_BYTES, MASK_BYTES = 8, 1

Terms = dict[str, int]


def count_activation_bytes(config: RunConfig, *, device: Device, stage: int = 0) -> Terms:
    """Bytes that a rank of a pipeline stage keeps of one microbatch, in all pieces of the stage.

    The device decides which back end of the attention runs, and what is fused.

    Raises:
        FieldError: there is no such stage.
    """
    return _added(_count_pieces(config, device, stage))


def count_peak_activation_bytes(
    config: RunConfig, *, device: Device, num_microbatches: int, stage: int = 0
) -> Terms:
    """Bytes that a rank of a stage keeps when it keeps the most, in a step of `num_microbatches` on each
    data rank: of as many as are in flight by 1F1B, plain or interleaved.

    Raises:
        FieldError: there is no such stage.
    """
    pieces = _count_pieces(config, device, stage)
    sizes = [sum(terms.values()) for terms in pieces]
    held = max(
        microbatches_in_flight(config, num_microbatches=num_microbatches, stage=stage),
        key=lambda counts: sum(count * size for count, size in zip(counts, sizes, strict=True)),
    )
    return _added(
        {name: count * size for name, size in terms.items()}
        for count, terms in zip(held, pieces, strict=True)
    )


def microbatches_in_flight(
    config: RunConfig, *, num_microbatches: int, stage: int = 0
) -> Iterator[tuple[int, ...]]:
    """After each forward pass of a step, of each piece the microbatches that wait for their backward pass.

    Megatron-core's 1F1B: a stage runs ahead of its first backward pass by the stages behind it. Interleaved,
    it takes the microbatches in rounds of as many as there are stages, all pieces of a round in order, and
    runs ahead by (v-1)·p pieces and twice the stages behind it; backward the pieces come in reverse.
    """
    stages, pieces = config.parallel.pipeline, config.parallel.virtual_pipeline
    turn = config.parallel.microbatch_group_size
    behind = stages - 1 - stage
    ahead = behind if pieces == 1 else 2 * behind + (pieces - 1) * stages
    held = [0] * pieces
    for done in range(num_microbatches * pieces):
        held[done // turn % pieces] += 1
        yield tuple(held)
        if done >= ahead:
            held[pieces - 1 - (done - ahead) // turn % pieces] -= 1


def _count_pieces(config: RunConfig, device: Device, stage: int) -> list[Terms]:
    """What each piece of a stage keeps of one microbatch."""
    config.parallel.check_stage(stage)
    layer = _layer_pass(config, device)
    return [
        _count_piece(config, layer, stage=stage, piece=piece)
        for piece in range(config.parallel.virtual_pipeline)
    ]


def _count_piece(config: RunConfig, layer: ActivationSpec, *, stage: int, piece: int) -> Terms:
    """Its layers, and what stands before the model's first and behind its last."""
    parallel, model = config.parallel, config.model
    num_layers = parallel.layers_of_stages(model.num_layers)[stage] // parallel.virtual_pipeline
    in_full = 0
    if config.training.recompute == "full":
        in_full = config.training.recompute_layers or num_layers
    is_first = stage == 0 and piece == 0
    is_last = stage == parallel.pipeline - 1 and piece == parallel.virtual_pipeline - 1
    terms = _added(
        [
            {"embedding": _count_embedding(config, layer) if is_first else 0},
            {name: (num_layers - in_full) * size for name, size in _count_layer(config, layer).items()},
            {"layer_inputs": in_full * layer.own(model.hidden_size)},
            _count_head(config, layer) if is_last else {},
        ]
    )
    return {name: size for name, size in terms.items() if size}


def _layer_pass(config: RunConfig, device: Device) -> ActivationSpec:
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
        heads=heads_of_tensor_rank(attention, tensor=parallel.tensor),
        attended_heads=attended_heads(attention, tensor=parallel.tensor, context=parallel.context),
        num_blocks=attention.num_blocks,
    )


def _count_layer(config: RunConfig, layer: ActivationSpec) -> Terms:
    model = config.model
    dropped = layer.dropped(layer.own_tokens * model.hidden_size) if model.hidden_dropout else 0
    return {
        "norms": 2 * layer.norm(model.hidden_size, model.normalization),
        **config.attention.count_activation_bytes(model.hidden_size, layer),
        "mlp": _count_mlp(config, layer),
        "residual": 2 * dropped,
    }


def _count_mlp(config: RunConfig, layer: ActivationSpec) -> int:
    """H of the input; swiglu: both halves of the first product, the gate, the other half, and the result;
    gelu: what it is applied to, and the result. A GPU's fused swiglu keeps the halves and the result.
    """
    model = config.model
    kept = layer.own(model.hidden_size)
    if "mlp" in layer.recomputed:
        return kept
    widths = {"gelu": 2, "swiglu": 3 if layer.device == "gpu" else 5}[model.activation]
    return kept + layer.whole(widths * model.ffn_hidden_size // layer.tensor)


def _count_embedding(config: RunConfig, layer: ActivationSpec) -> int:
    """Of tokens that a tensor rank looks up in its part of the table; one rank's are the batch's own."""
    model = config.model
    dropped = layer.dropped(layer.own_tokens * model.hidden_size) if model.hidden_dropout else 0
    return dropped + (layer.tokens * (INDEX_BYTES + MASK_BYTES) if layer.tensor > 1 else 0)


def _count_head(config: RunConfig, layer: ActivationSpec) -> Terms:
    """The final norm; the output layer's input, and of the loss probabilities in float32 and labels."""
    model = config.model
    probabilities = FLOAT32_BYTES * layer.tokens * model.padded_vocab_size // layer.tensor
    labels = layer.tokens * (INDEX_BYTES + MASK_BYTES)
    return {
        "norms": layer.norm(model.hidden_size, model.normalization),
        "head": layer.own(model.hidden_size) + probabilities + labels,
    }


def _added(parts: Iterable[Terms]) -> Terms:
    total: Terms = {}
    for terms in parts:
        for name, size in terms.items():
            total[name] = total.get(name, 0) + size
    return total
