"""Costs of multi-head latent attention. No torch."""

from __future__ import annotations

from typing_extensions import override

from sas_megatron.attention.mla.config import LatentAttentionConfig
from sas_megatron.costs.activation_spec import ActivationSpec
from sas_megatron.costs.attention import AttentionCosts
from sas_megatron.costs.tensor_traffic import GRADIENT_BYTES, TensorGroup, Traffic, Weight


class LatentCosts(AttentionCosts):
    """Terms: `query`, or `query_down` and `query_up`; `key_value_down`, `key_value_up`, `projection`,
    `latent_norms`, `scores`, `values`.
    """

    attention: LatentAttentionConfig

    @override
    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        sizes = self._matrix_sizes(hidden_size)
        query_rank = self.attention.query_lora_rank

        def replicated(term: str, elements: int) -> Weight:
            return Weight(term, elements, partial_over="tokens")

        def sharded(term: str) -> Weight:
            return Weight(term, sizes[term], sharded=True)

        def latent_weights(name: str, rank: int) -> list[Weight]:
            return [
                replicated(f"{name}_down", sizes[f"{name}_down"]),
                replicated("latent_norms", rank),
                sharded(f"{name}_up"),
            ]

        return [
            *([sharded("query")] if query_rank is None else latent_weights("query", query_rank)),
            *latent_weights("key_value", self.attention.kv_lora_rank),
            *self.projection_weights(hidden_size, linear_bias=linear_bias),
        ]

    @override
    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Return the traffic of column-parallel inputs, of the shared rotary key, and of the output."""
        rank = self.attention.query_lora_rank
        return {
            "query" if rank is None else "query_up": group.column_parallel_input(rank or hidden_size),
            # Without sequence parallelism, `DownProjection` sums the gradients of these columns in float32.
            "key_value_down": group.shared_columns(
                self.attention.rotary_head_dim, gradient_bytes=GRADIENT_BYTES
            ),
            "key_value_up": group.column_parallel_input(self.attention.kv_lora_rank),
            "projection": group.row_parallel_output(hidden_size),
        }

    @override
    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Return the forward FLOPs of one token by term; scores are over D + R features, values over V."""
        heads = 2 * sequence_length * self.attention.num_heads
        return {
            **{name: 2 * size for name, size in self._matrix_sizes(hidden_size).items()},
            "scores": heads * self.attention.query_key_dim,
            "values": heads * self.attention.value_width,
        }

    def _matrix_sizes(self, hidden_size: int) -> dict[str, int]:
        """Return the elements of each matrix."""
        attention = self.attention
        query_width = attention.num_heads * attention.query_key_dim
        if attention.query_lora_rank is None:
            query = {"query": hidden_size * query_width}
        else:
            query = {
                "query_down": hidden_size * attention.query_lora_rank,
                "query_up": attention.query_lora_rank * query_width,
            }
        heads_width = attention.num_heads * (attention.head_dim + attention.value_width)
        return {
            **query,
            "key_value_down": hidden_size * (attention.kv_lora_rank + attention.rotary_head_dim),
            "key_value_up": attention.kv_lora_rank * heads_width,
            "projection": attention.num_heads * attention.value_width * hidden_size,
        }

    @override
    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Return the bytes of the inputs of projections (each once), of the norms, and of core attention.

        The cosines and sines are twice as wide as for other variants, since Megatron-core applies rotary
        embeddings to these features with its unfused function, unless each sample has its own positions.
        """
        attention = self.attention
        latent, rank = attention.kv_lora_rank, attention.query_lora_rank
        norms = layer.norm_bytes(latent, "rmsnorm", input_width=latent + attention.rotary_head_dim)
        if rank is None:
            inputs = {"key_value_down": layer.local_bytes(hidden_size)}
        else:
            inputs = {"query_down": layer.local_bytes(hidden_size), "query_up": layer.local_bytes(rank)}
            norms += layer.norm_bytes(rank, "rmsnorm")
        value_width = attention.num_heads // layer.tensor * attention.value_width
        has_own_positions = layer.restarts and layer.batch > 1
        return {
            **inputs,
            "latent_norms": norms,
            "key_value_up": layer.local_bytes(latent),
            **self.count_core_bytes(layer, value_bytes=layer.full_bytes(value_width)),
            "rotary": layer.rope_bytes(attention.rotary_width // (2 if has_own_positions else 1)),
        }

    @override
    def count_kv_cache_elements(self) -> dict[str, int]:
        """Return the latent of keys and values, and the rotary key that all heads share."""
        return {"latent": self.attention.kv_lora_rank, "rotary_key": self.attention.rotary_head_dim}
