"""Rules on the heads of attention and the ranks that share them."""

from __future__ import annotations

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import divisors, largest_at_most


def check_tensor_parallel(attention: AttentionConfig, tensor: int) -> None:
    """Check that the heads can be sharded over `tensor` ranks.

    Raises:
        FieldError: The heads cannot be sharded.
    """
    groups = attention.num_key_value_heads
    if attention.num_heads % tensor:
        raise attention.problem(
            "num_heads",
            f"must be divisible by parallel.tensor={tensor}, the ranks that share the heads",
            f"set parallel.tensor to one of {divisors(attention.num_heads)}",
            _fix_tensor(attention, tensor),
        )
    if groups % tensor and tensor % groups:
        legal = [p for p in divisors(attention.num_heads) if groups % p == 0 or p % groups == 0]
        raise FieldError(
            "attention.num_kv_heads",
            groups,
            f"must be a multiple or a divisor of parallel.tensor={tensor}",
            f"set parallel.tensor to one of {legal}",
            _fix_tensor(attention, tensor),
        )
    if attention.has_fused_qkv and groups < tensor and attention.qkv_width % tensor:
        # With fewer key/value heads than ranks, Megatron-core shards columns rather than heads.
        raise attention.problem(
            "head_dim",
            f"gives {attention.qkv_width} columns of queries, keys and values, which must be divisible by "
            f"parallel.tensor={tensor} if there are only {groups} key/value heads",
            f"use a multiple of {tensor}",
            _fix_tensor(attention, tensor),
        )


def _fix_tensor(attention: AttentionConfig, tensor: int) -> tuple[str, ...]:
    """Return the largest tensor-parallel size up to `tensor` that passes, as an override."""
    groups = attention.num_key_value_heads
    legal = [
        p
        for p in divisors(attention.num_heads)
        if groups % p == 0 or (p % groups == 0 and not (attention.has_fused_qkv and attention.qkv_width % p))
    ]
    return (f"parallel.tensor={largest_at_most(tensor, legal)}",)


def check_context_parallel(attention: AttentionConfig, tensor: int, context: int) -> None:
    """Check that the heads of a tensor rank can be sharded over `context` ranks.

    Raises:
        FieldError: The heads of a tensor rank cannot be sharded.
    """
    heads = attention.num_attended_heads // tensor
    if heads % context:
        raise FieldError(
            "parallel.context",
            context,
            f"must divide the {heads} heads of each of parallel.tensor={tensor} ranks",
            f"use one of {divisors(heads)}",
            (f"parallel.context={largest_at_most(context, divisors(heads))}",),
        )
