"""Costs of multi-head, grouped-query and multi-query attention. No torch."""

from sas_megatron.costs.attention import AttentionCosts


class GroupedQueryCosts(AttentionCosts):
    """The costs of Megatron-core's self-attention, which are the defaults."""
