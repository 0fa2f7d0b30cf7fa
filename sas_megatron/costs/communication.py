"""What a rank sends in one optimizer step, from the run's config alone, as named terms that sum. No torch.

Groups and bytes are those of `distributed.communication_counter`, which counts the same of a run: by the ring
convention, in which a rank of n that moves b bytes sends 2(n-1)/n·b in an all-reduce, (n-1)/n·b in an
all-gather, a reduce-scatter and an all-to-all, and b in a send. Each byte is what Megatron-core's
engine sends; with P tensor, C context and D data ranks, m microbatches of T tokens each on a context
rank, v pieces of the model in each of p pipeline stages:

    tensor    m × each layer's activations, forward, backward and again where they are recomputed;
              embedding, output layer and 3 sums over the vocabulary of the loss of each token;
              sums of the gradients of weights that all ranks hold and use in part
    context   m × each layer's trade of tokens for heads, there and back, forward and backward
    pipeline  m × T·H, divided by P under sequence parallelism, for each piece, forward and backward
    data      the gradients of a rank's parameters, all-reduced over D·C ranks; with the distributed
              optimizer reduced and scattered, and the parameters gathered, each with its padding
    other     the gradients of a tied table, all-reduced between first and last stage

and in each but the second some numbers that the ranks must agree on, as `bookkeeping`.
"""

from __future__ import annotations

from fractions import Fraction

from sas_megatron.attention.shared_heads import count_context_elements
from sas_megatron.config.run import RunConfig
from sas_megatron.config.tensor_group import GRADIENT_BYTES, TensorGroup, Traffic
from sas_megatron.costs.gradient_buffers import count_buffer_elements, overlapped_bucket_elements
from sas_megatron.costs.model_costs import EMBEDDING_TERMS
from sas_megatron.costs.weights import chunk_weights, table_weight

# What one of `training.recompute_modules` sends again, where it is not the term of its own name.
RECOMPUTED_TERMS = {"attention": "context_exchange", "simulation": "head_simulation"}

# What all ranks agree on in a step, in float64: loss, tokens, gradient norm, and whether to stop.
AGREED_BYTES = 4 * 8

Terms = dict[str, Fraction]


def count_communication_bytes(
    config: RunConfig, *, world_size: int, stage: int = 0
) -> dict[str, dict[str, int]]:
    """Bytes that the first rank of a pipeline stage sends in one optimizer step, by group and term.

    Every rank of the stage sends as much, but where SAS trades heads for tokens among tensor ranks that
    do not divide them. Terms are rounded so that they sum to the group's rounded total; what nothing is
    sent for is left out.

    Raises:
        FieldError: the layout does not fit the world size, there is no such stage, or the engine is
            DeepSpeed.
    """
    data_parallel = config.check_world_size(world_size)
    config.parallel.check_stage(stage)
    if config.training.engine != "megatron":
        raise config.training.problem(
            "engine",
            "sends what DeepSpeed decides, which is not counted from the config",
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
    rounded = {group: _rounded(terms) for group, terms in groups.items()}
    return {group: terms for group, terms in rounded.items() if terms}


class _Step:
    """One optimizer step on one rank: by group, its terms."""

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
        self.pieces = [
            chunk_weights(config, stage=stage, piece=piece) for piece in range(self.parallel.virtual_pipeline)
        ]

    def tensor(self) -> Terms:
        """Activations, by the parts that need them whole; sums of gradients, by the weights they are of."""
        hidden, ranks = self.model.hidden_size, self.parallel.tensor
        group = TensorGroup(ranks, self.tokens, self.parallel.sequence, self.element_bytes)
        terms = self._sent_by_layers(
            {
                **self.config.attention.count_tensor_traffic(hidden, group),
                "mlp": group.into_columns(hidden) + group.out_of_rows(hidden),
            }
        )
        if self.is_first:
            terms["embedding"] = self.num_microbatches * group.out_of_rows(hidden).both
        if self.is_last:
            # Of each token's logits, in float32: their maximum, the label's, the sum of exponentials.
            loss = 3 * _all_reduce(4 * self.tokens, ranks)
            terms["head"] = self.num_microbatches * (group.into_columns(hidden).both + loss)
        for name, elements in self._count_summed_weights().items():
            terms[name] = terms.get(name, Fraction(0)) + _all_reduce(GRADIENT_BYTES * elements, ranks)
        return {**terms, "bookkeeping": _all_reduce(AGREED_BYTES, ranks)}

    def _count_summed_weights(self) -> dict[str, int]:
        """Elements by term whose gradients the tensor ranks add up, as often as they do so in a step."""
        times = {"layer": self.num_microbatches, "engine": 1}
        terms: dict[str, int] = {}
        for piece in self.pieces:
            for weight in piece:
                if weight.is_summed(sequence=self.parallel.sequence):
                    terms[weight.term] = terms.get(weight.term, 0) + times[weight.summed_by] * weight.elements
        return terms

    def context(self) -> Terms:
        """Tokens traded for heads and back, around each layer's attention."""
        elements = count_context_elements(
            self.config.attention, tensor=self.parallel.tensor, context=self.parallel.context
        )
        one_way = self.tokens * self.element_bytes * elements
        return self._sent_by_layers({"context_exchange": Traffic(one_way, one_way)})

    def _sent_by_layers(self, layer: dict[str, Traffic]) -> Terms:
        """What the stage's layers send in all microbatches, from one layer and microbatch."""
        terms = {name: self.num_layers * traffic.both for name, traffic in layer.items()}
        training, num_again = self.config.training, self.num_layers
        again = {RECOMPUTED_TERMS.get(module, module) for module in self.config.recomputed_modules}
        if training.recompute == "full":
            again = set(layer)
            if training.recompute_layers is not None:
                num_again = training.recompute_layers * len(self.pieces)
        terms["recompute"] = num_again * sum(
            (layer[name].forward for name in again & layer.keys()), Fraction(0)
        )
        return {name: self.num_microbatches * sent for name, sent in terms.items()}

    def pipeline(self) -> Terms:
        """Activations to the next stage and their gradients to the one before, of each piece."""
        stages, pieces = self.parallel.pipeline, self.parallel.virtual_pipeline
        sends = 2 * pieces - self.is_first - self.is_last
        shared_by = self.parallel.tensor if self.parallel.sequence else 1
        activations = self.tokens // shared_by * self.model.hidden_size * self.element_bytes
        return {
            "activations": Fraction(self.num_microbatches * sends * activations),
            # The last stage's number of tokens, an int32.
            "bookkeeping": Fraction((stages - 1) * 4, stages) + _all_reduce(AGREED_BYTES, stages),
        }

    def data(self) -> Terms:
        """Gradients of the rank's weights, and with the distributed optimizer the weights."""
        ranks = self.data_ranks
        # The number of tokens, an int32.
        terms = {"bookkeeping": _all_reduce(4 + AGREED_BYTES, ranks)}
        if self.config.optimizer.distributed:
            elements = sum(self._count_buffer(piece) for piece in range(len(self.pieces)))
            once = Fraction((ranks - 1) * elements, ranks)
            return {"gradients": GRADIENT_BYTES * once, "parameters": self.element_bytes * once, **terms}
        elements = sum(
            weight.elements_of_rank(self.parallel.tensor) for piece in self.pieces for weight in piece
        )
        return {"gradients": _all_reduce(GRADIENT_BYTES * elements, ranks), **terms}

    def _count_buffer(self, piece: int) -> int:
        """Elements of the distributed optimizer's buffer for one piece."""
        parallel = self.parallel
        in_buckets = parallel.overlap_gradient_reduce and self.is_first and piece == 0
        tied = self.model.tie_embeddings and parallel.pipeline > 1
        return count_buffer_elements(
            self.pieces[piece],
            tensor=parallel.tensor,
            data_ranks=self.data_ranks,
            bucket_elements=overlapped_bucket_elements(self.data_parallel) if in_buckets else None,
            own_buckets=EMBEDDING_TERMS if tied else (),
        )

    def other(self) -> Terms:
        """A tied table's gradient, which first and last stage each have a part of; the gradient norm."""
        parallel = self.parallel
        tied = self.model.tie_embeddings and parallel.pipeline > 1 and (self.is_first or self.is_last)
        table = table_weight(self.model, "embedding").elements_of_rank(parallel.tensor)
        sharing = parallel.tensor * parallel.pipeline
        if self.config.optimizer.distributed:
            sharing *= self.data_ranks
        return {
            "embedding": _all_reduce(GRADIENT_BYTES * table, 2 if tied else 1),
            "bookkeeping": _all_reduce(4, sharing),
        }


def _all_reduce(num_bytes: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1) * num_bytes, ranks)


def _rounded(terms: Terms) -> dict[str, int]:
    """To whole bytes, so that they sum to their rounded sum; without those that are nothing."""
    rounded, total = {}, Fraction(0)
    for name, count in terms.items():
        before, total = round(total), total + count
        if count:
            rounded[name] = round(total) - before
    return rounded
