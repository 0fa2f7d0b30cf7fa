"""Bytes that a rank sends in one optimizer step, from the run's config alone, by group and term. No torch.

`distributed.communication_counter` counts the same groups and bytes in a run, by the ring convention: for a
tensor of b bytes, each of n ranks sends 2(n-1)/n·b in an all-reduce, (n-1)/n·b in an all-gather, a
reduce-scatter and an all-to-all, and b in a send. Counted is Megatron-core's engine, with P tensor, C context
and D data ranks, m microbatches of T tokens on each context rank, and v model chunks in each of p stages:

    tensor    m × each layer's activations in the forward and backward pass, and again if recomputed;
              embedding, output layer, and the loss's three sums over the vocabulary for each token;
              sums of partial gradients of replicated weights
    context   m × each layer's exchange of tokens for heads and back, in the forward and backward pass
    pipeline  m × T·H, divided by P under sequence parallelism, per model chunk, forward and backward
    data      gradients, all-reduced over D·C ranks; or, with the distributed optimizer, reduce-scattered
              gradients and all-gathered parameters, with their padding
    other     the gradient of a tied table, all-reduced between the first and the last stage

Every group but `context` also has a term `bookkeeping`: a few numbers that the ranks agree on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.head_sharding import count_context_elements
from sas_megatron.costs.parameters import EMBEDDING_TERMS, chunk_weights, table_weight
from sas_megatron.costs.tensor_traffic import GRADIENT_BYTES, TensorGroup, Traffic, Weight

# The term that a part named in `training.recompute_modules` sends again, if it has another name.
RECOMPUTED_TERMS = {"attention": "context_exchange", "simulation": "head_simulation"}

# Loss, tokens, gradient norm and the decision to stop, in float64, on which all ranks agree in a step.
AGREED_BYTES = 4 * 8

# Alignment in the buffers of Megatron-core's distributed optimizer, in elements (megatron-core 0.16.1,
# `distributed/param_and_grad_buffer.py`), and the size of its buckets (`distributed_data_parallel.py`).
WEIGHT_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
BUCKET_ELEMENTS = 40_000_000
BUCKET_ELEMENTS_PER_RANK = 1_000_000

Terms = dict[str, Fraction]


def count_communication_bytes(
    config: RunConfig, *, world_size: int, stage: int = 0
) -> dict[str, dict[str, int]]:
    """Return the bytes that the first rank of a pipeline stage sends in one step, by group and term.

    The other ranks of the stage send the same, except if SAS exchanges heads for tokens by all-to-all and the
    tensor ranks do not divide the tokens. Terms are rounded such that they sum to the rounded total of their
    group; groups and terms of zero bytes are omitted.

    Args:
        config: The run.
        world_size: Number of ranks.
        stage: The pipeline stage.

    Raises:
        FieldError: The layout does not fit the world size, the stage does not exist, or the engine is
            DeepSpeed.
    """
    data_parallel = config.check_world_size(world_size)
    config.parallel.check_stage(stage)
    if config.training.engine != "megatron":
        raise config.training.problem(
            "engine",
            "has communication that DeepSpeed decides, which is not counted from the config",
            "set training.engine=megatron, or measure with logging.communication_counter=true",
        )
    step = _Step(config, data_parallel, stage)
    groups = {
        "tensor": step.tensor(),
        "context": step.context(),
        "pipeline": step.pipeline(),
        "data": step.data(),
        "other": step.other(),
    }
    rounded = {group: _round_terms(terms) for group, terms in groups.items()}
    return {group: terms for group, terms in rounded.items() if terms}


class _Step:
    """One optimizer step on one rank; each method returns the terms of one group."""

    def __init__(self, config: RunConfig, data_parallel: int, stage: int) -> None:
        self.config, self.model, self.parallel = config, config.model, config.parallel
        self.data_parallel = data_parallel
        self.data_ranks = data_parallel * config.parallel.context
        self.is_first = stage == 0
        self.is_last = stage == self.parallel.pipeline - 1
        self.num_layers = self.parallel.layers_of_stages(self.model.num_layers)[stage]
        self.num_microbatches = config.training.num_microbatches(data_parallel)
        self.element_bytes = config.training.element_bytes
        context_tokens = config.data.sequence_length // self.parallel.context
        self.tokens = config.training.micro_batch_size * context_tokens
        self.chunks = [
            chunk_weights(config, stage=stage, chunk=chunk) for chunk in range(self.parallel.virtual_pipeline)
        ]

    def tensor(self) -> Terms:
        """Return activations by the part of the layer, and sums of gradients by the weights' terms."""
        hidden, ranks = self.model.hidden_size, self.parallel.tensor
        group = TensorGroup(ranks, self.tokens, self.parallel.sequence, self.element_bytes)
        terms = self._sum_over_layers(
            {
                **build_attention_costs(self.config.attention).count_tensor_traffic(hidden, group),
                "mlp": group.column_parallel_input(hidden) + group.row_parallel_output(hidden),
            }
        )
        if self.is_first:
            terms["embedding"] = self.num_microbatches * group.row_parallel_output(hidden).total
        if self.is_last:
            # Three float32 values per token are reduced: the largest logit, the label's logit, and the sum of
            # exponentials.
            loss = 3 * _all_reduce(4 * self.tokens, ranks)
            terms["head"] = self.num_microbatches * (group.column_parallel_input(hidden).total + loss)
        for name, elements in self._count_summed_weights().items():
            terms[name] = terms.get(name, Fraction(0)) + _all_reduce(GRADIENT_BYTES * elements, ranks)
        return {**terms, "bookkeeping": _all_reduce(AGREED_BYTES, ranks)}

    def _count_summed_weights(self) -> dict[str, int]:
        """Return the elements of gradients that tensor ranks sum in a step, by term, repetitions included."""
        times = {"layer": self.num_microbatches, "engine": 1}
        terms: dict[str, int] = {}
        for chunk in self.chunks:
            for weight in chunk:
                if weight.is_summed(sequence=self.parallel.sequence):
                    terms[weight.term] = terms.get(weight.term, 0) + times[weight.summed_by] * weight.elements
        return terms

    def context(self) -> Terms:
        """Return the exchange of tokens for heads, and back, around each layer's core attention."""
        elements = count_context_elements(
            self.config.attention, tensor=self.parallel.tensor, context=self.parallel.context
        )
        one_way = self.tokens * self.element_bytes * elements
        return self._sum_over_layers({"context_exchange": Traffic(one_way, one_way)})

    def _sum_over_layers(self, layer: dict[str, Traffic]) -> Terms:
        """Return the terms of the stage's layers in all microbatches, given one layer and microbatch."""
        terms = {name: self.num_layers * traffic.total for name, traffic in layer.items()}
        training, num_recomputed = self.config.training, self.num_layers
        recomputed = {RECOMPUTED_TERMS.get(module, module) for module in self.config.recomputed_modules}
        if training.recompute == "full":
            recomputed = set(layer)
            if training.recompute_layers is not None:
                num_recomputed = training.recompute_layers * len(self.chunks)
        terms["recompute"] = num_recomputed * sum(
            (layer[name].forward for name in recomputed & layer.keys()), Fraction(0)
        )
        return {name: self.num_microbatches * sent for name, sent in terms.items()}

    def pipeline(self) -> Terms:
        """Return activations sent to the next stage and gradients to the previous one, per model chunk."""
        stages, num_chunks = self.parallel.pipeline, self.parallel.virtual_pipeline
        sends = 2 * num_chunks - self.is_first - self.is_last
        shards = self.parallel.tensor if self.parallel.sequence else 1
        activations = self.tokens // shards * self.model.hidden_size * self.element_bytes
        return {
            "activations": Fraction(self.num_microbatches * sends * activations),
            # The last stage broadcasts its number of tokens, an int32.
            "bookkeeping": Fraction((stages - 1) * 4, stages) + _all_reduce(AGREED_BYTES, stages),
        }

    def data(self) -> Terms:
        """Return the gradients of the rank's weights, and with the distributed optimizer the weights."""
        ranks = self.data_ranks
        # The number of tokens is an int32.
        terms = {"bookkeeping": _all_reduce(4 + AGREED_BYTES, ranks)}
        if self.config.optimizer.distributed:
            elements = sum(self._count_buffer(chunk) for chunk in range(len(self.chunks)))
            once = Fraction((ranks - 1) * elements, ranks)
            return {"gradients": GRADIENT_BYTES * once, "parameters": self.element_bytes * once, **terms}
        elements = sum(
            weight.count_local_elements(self.parallel.tensor) for chunk in self.chunks for weight in chunk
        )
        return {"gradients": _all_reduce(GRADIENT_BYTES * elements, ranks), **terms}

    def _count_buffer(self, chunk: int) -> int:
        """Return the elements of the distributed optimizer's buffer of one model chunk."""
        parallel = self.parallel
        has_buckets = parallel.overlap_gradient_reduce and self.is_first and chunk == 0
        is_tied = self.model.tie_embeddings and parallel.pipeline > 1
        return count_buffer_elements(
            self.chunks[chunk],
            tensor=parallel.tensor,
            data_ranks=self.data_ranks,
            bucket_elements=overlapped_bucket_elements(self.data_parallel) if has_buckets else None,
            separate_terms=EMBEDDING_TERMS if is_tied else (),
        )

    def other(self) -> Terms:
        """Return the gradient of a tied table, which the first and last stage hold, and the gradient norm."""
        parallel = self.parallel
        is_tied = self.model.tie_embeddings and parallel.pipeline > 1 and (self.is_first or self.is_last)
        table = table_weight(self.model, "embedding").count_local_elements(parallel.tensor)
        norm_ranks = parallel.tensor * parallel.pipeline
        if self.config.optimizer.distributed:
            norm_ranks *= self.data_ranks
        return {
            "embedding": _all_reduce(GRADIENT_BYTES * table, 2 if is_tied else 1),
            "bookkeeping": _all_reduce(4, norm_ranks),
        }


def _all_reduce(num_bytes: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1) * num_bytes, ranks)


def _round_terms(terms: Terms) -> dict[str, int]:
    """Round to bytes such that the terms sum to their rounded total; omit terms of zero."""
    rounded, total = {}, Fraction(0)
    for name, count in terms.items():
        before, total = round(total), total + count
        if count:
            rounded[name] = round(total) - before
    return rounded


def count_buffer_elements(
    weights: Sequence[Weight],
    *,
    tensor: int,
    data_ranks: int,
    bucket_elements: int | None = None,
    separate_terms: Sequence[str] = (),
) -> int:
    """Return the elements of one rank's buffer in the distributed optimizer, padding included.

    The weights, the last registered one first, are divided into buckets, and each data rank owns an equal
    shard of every bucket. Alignment adds padding between weights and at the ends of buckets, which is sent
    with them.

    Args:
        weights: The weights of one model chunk, in the order in which they are registered.
        tensor: Number of tensor ranks.
        data_ranks: Number of ranks that share a bucket, context ranks included.
        bucket_elements: A bucket ends when it has this many elements; None for a single bucket.
        separate_terms: Cost terms of tables that have separate buckets.
    """
    alignment = math.lcm(data_ranks, BUCKET_ALIGNMENT)
    limit = math.inf if bucket_elements is None else bucket_elements
    end = bucket_start = 0
    for weight in reversed(weights):
        is_separate = weight.term in separate_terms
        end = _round_up(end, WEIGHT_ALIGNMENT)
        if is_separate:
            end = bucket_start = _round_up(end, alignment)
        end += weight.count_local_elements(tensor)
        if is_separate or end - bucket_start >= limit:
            end = bucket_start = _round_up(end, alignment)
    return _round_up(end, alignment)


def overlapped_bucket_elements(data_parallel: int) -> int:
    """Return the size at which a bucket ends if its reduction overlaps the backward pass."""
    return max(BUCKET_ELEMENTS, data_parallel * BUCKET_ELEMENTS_PER_RANK)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
