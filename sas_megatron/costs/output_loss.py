"""How the loss is computed from hidden states: with the logits of all tokens, or in chunks. No torch.

    full       Megatron-core's: the float32 probabilities [T, V/P] are saved for the backward pass; on a CPU
               with one tensor rank, they are computed in blocks of tokens that stay in the cache
    chunked    logits of CHUNK_BYTES at a time, for some columns of the vocabulary and all tokens; the
               backward pass computes them again, so that only the log-sum-exp [T] is saved
    auto       chunked if the probabilities exceed CHUNK_BYTES, or with a z-loss; otherwise full

T is the number of tokens of a context rank's microbatch, V the padded vocabulary, and P the tensor ranks.
"""

from __future__ import annotations

from typing import Literal

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activation_spec import FLOAT32_BYTES
from sas_megatron.costs.attention_backend import Device

OutputLoss = Literal["full", "chunked"]
# At 8,192 tokens a chunk has 8,192 columns, which is wide enough for products at full speed; the smaller the
# chunk, the more often all hidden states are read. Below this size the probabilities are a small part of a
# model's activations, and computing the logits again would cost time for nothing.
CHUNK_BYTES = 2**28
# Multiple of the columns of a chunk, for aligned tiles of matrix products.
COLUMN_MULTIPLE = 128


def resolve_output_loss(config: RunConfig) -> OutputLoss:
    """Return the implementation that `model.output_loss` selects."""
    model = config.model
    if model.output_loss != "auto":
        return model.output_loss
    return "chunked" if model.z_loss > 0 or count_probability_bytes(config) > CHUNK_BYTES else "full"


def is_loss_blocked(config: RunConfig, *, device: Device) -> bool:
    """Return whether the full loss is computed in blocks of tokens, which is faster on a CPU.

    DeepSpeed may shard the output weight, and gathers it for the output layer alone, which is not used then.
    """
    return (
        device == "cpu"
        and resolve_output_loss(config) == "full"
        and config.parallel.tensor == 1
        and config.training.precision == "float32"
        and config.training.engine == "megatron"
    )


def count_probability_bytes(config: RunConfig) -> int:
    """Return the bytes of the float32 probabilities [T, V/P] of a microbatch on one rank."""
    tokens = config.training.micro_batch_size * config.data.sequence_length // config.parallel.context
    return FLOAT32_BYTES * tokens * config.model.padded_vocab_size // config.parallel.tensor


def count_chunk_columns(num_tokens: int) -> int:
    """Return the columns of the vocabulary whose float32 logits for `num_tokens` take at most CHUNK_BYTES.

    The number is a multiple of COLUMN_MULTIPLE, and at least that.
    """
    columns = CHUNK_BYTES // (FLOAT32_BYTES * max(1, num_tokens))
    return max(1, columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
