"""What the simulation of SAS keeps of a microbatch for its backward pass; no torch.

linear_qkv  ->  base heads, of the tokens at hand        kept by the first maps, as views where they can be
            ->  first map, ReLU                          kept by the second maps
            ->  second map, sent home                    kept by the feature simulation, value by attention
            ->  features: first map, ReLU                kept by the second map

Fused kernels keep the columns of the tokens at hand, and heads that other ranks have sent home.
"""

from __future__ import annotations

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.exchange_choice import exchange_of
from sas_megatron.attention.sas.kernel_choice import is_fused
from sas_megatron.config.layer_pass import ActivationSpec


class SimulationPass:
    """The simulation in one layer's forward pass on one tensor rank, the first."""

    def __init__(self, attention: SimulatedAttentionConfig, layer: ActivationSpec) -> None:
        self.attention, self.layer = attention, layer
        self.is_fused = is_fused(attention, device=layer.device, element_bytes=layer.element_bytes)
        self.simulations = attention.head_simulations()
        self.base_heads = {
            "query": attention.num_heads,
            "key": attention.num_key_value_heads,
            "value": attention.num_key_value_heads,
        }
        shares = layer.tensor > 1 and attention.simulates_heads
        self.exchange = exchange_of(attention, tensor_parallel=layer.tensor) if shares else None
        # By all_to_all, query, key and value come home side by side, and are views of that.
        self.home_columns = self._count_home_columns() if self.exchange == "all_to_all" else None

    def count_projected_bytes(self) -> int:
        """What it starts from: the rank's projected columns, and queries where they are a copy."""
        attention, ranks = self.attention, self.layer.tensor
        if attention.simulates_heads:
            return self.layer.whole(attention.qkv_width // ranks)
        queries, groups = self.base_heads["query"] // ranks, max(1, self.base_heads["key"] // ranks)
        gathered = self.base_heads["key"] < ranks
        columns = attention.qkv_width // (1 if gathered else ranks)
        return self.layer.whole(columns + (queries * attention.head_dim if 1 < groups < queries else 0))

    def count_head_bytes(self) -> int:
        """The base heads of the tokens at hand, the ReLUs' results, and what of the weights is copied."""
        attention = self.attention
        tokens = self.layer.tokens
        if self.exchange == "all_to_all":
            # The first rank has one more than the last where ranks do not divide them.
            tokens = -(-tokens // self.layer.tensor)
        if self.is_fused:
            return self.layer.element_bytes * tokens * attention.qkv_width
        # Queries of several groups are not side by side among the columns; all else is a view of them.
        copied = "query" in self.simulations and 1 < self.base_heads["key"] < self.base_heads["query"]
        viewed = len(self.simulations) > (1 if copied else 0)
        columns = (attention.qkv_width if viewed else 0) + (
            attention.num_heads * attention.head_dim if copied else 0
        )
        simulated = attention.head_expansion * sum(self.simulations.values()) * attention.head_dim
        return self.layer.element_bytes * (tokens * (columns + simulated) + self._count_copied_weights())

    def count_feature_bytes(self) -> int:
        """For query and key D features of each head, and the ReLU's E."""
        heads = dict(zip(("query", "key"), self.layer.heads, strict=True))
        if self.is_fused:
            computed_here = self.attention.simulates_heads and self.exchange != "all_to_all"
            return 0 if computed_here else self.layer.whole(sum(heads.values()) * self.attention.head_dim)
        alone = self._heads_alone()
        rows = sum(count * self.attention.head_dim for name, count in heads.items() if name not in alone)
        made = sum(heads.values()) * self.attention.query_key_dim
        return self.layer.whole(rows + made + (self.home_columns or 0 if alone else 0))

    def count_value_bytes(self) -> int:
        """Of what the value is a view of: itself, or all that came home."""
        heads = self.layer.heads[1]
        # Chunks of queries need it in one piece, which of several heads and sequences it is not.
        copied = "attention" not in self.layer.recomputed and self.layer.batch > 1 and heads > 1
        if self.home_columns is None or "value" not in self.simulations or copied:
            return self.layer.whole(heads * self.attention.head_dim)
        kept_by_features = self.attention.simulate_features and "simulation" not in self.layer.recomputed
        if kept_by_features and not self.is_fused and self._heads_alone():
            return 0
        return self.layer.whole(self.home_columns)

    def _heads_alone(self) -> list[str]:
        """Of query and key, those of which a rank has one head: its rows are a view of all that came."""
        names = zip(("query", "key"), self.layer.heads, strict=True)
        return [
            name for name, heads in names if self.home_columns and name in self.simulations and heads == 1
        ]

    def _count_home_columns(self) -> int:
        expansion = self.attention.head_expansion
        heads = sum(
            max(1, base // self.layer.tensor) * (expansion if name in self.simulations else 1)
            for name, base in self.base_heads.items()
        )
        return heads * self.attention.head_dim

    def _count_copied_weights(self) -> int:
        """By gather, the rank's own rows of the second maps, where they are spread over several blocks."""
        expansion = self.attention.head_expansion
        if self.exchange != "gather" or expansion == 1:
            return 0
        own = {name: base // self.layer.tensor for name, base in self.simulations.items()}
        return sum(
            expansion * own[name] * expansion * base * self.attention.kernel_size
            for name, base in self.simulations.items()
            if own[name] > 1
        )
