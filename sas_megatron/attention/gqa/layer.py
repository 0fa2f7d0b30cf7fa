"""Multi-head, grouped-query and multi-query attention as Megatron-core's `SelfAttention`."""

from sas_megatron.attention.layer import SelfAttentionLayer


class GroupedQueryAttention(SelfAttentionLayer):
    """Self-attention on Megatron-core's fused projection, which is the default layer."""
