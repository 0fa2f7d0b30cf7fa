"""Costs of SAS, and the choice between fused and plain kernels. No torch.

The simulation saves these tensors of a microbatch for its backward pass:

    linear_qkv  ->  base heads of the exchanged tokens              for the first maps, as views if possible
                ->  first map, activation function                  for the second maps
                ->  second map, exchanged back                      for feature simulation, and the value
                ->  feature simulation: first map, activation       for its second map

ReLU saves its result only, which the second map reads; GELU saves its input as well.

The fused kernels save the columns of the exchanged tokens, and heads that other ranks have sent. Whether they
run (`is_fused`) depends on `attention.kernel`, the device, and the sizes of their tiles.
"""

from __future__ import annotations

from typing_extensions import override

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.tensor_parallel import exchange_traffic, resolve_exchange
from sas_megatron.costs.activation_spec import ActivationSpec
from sas_megatron.costs.attention import AttentionCosts
from sas_megatron.costs.attention_backend import Device
from sas_megatron.costs.kernel_tiles import (
    SHARED_MEMORY_BYTES,
    TILE_ROWS,
    padded_size,
    split_size,
    taps_at_once,
)
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic, Weight

# Bytes of a bfloat16, the dtype of the fused kernels.
ELEMENT_BYTES = 2
# Tensors of a simulation's size that an activation function and the map after it save.
SAVED_BY_ACTIVATION = {"relu": 1, "gelu": 2, "none": 1}


class SimulatedCosts(AttentionCosts):
    """Terms: `qkv`, `head_simulation`, `feature_simulation`, `scores`, `values`, `projection`."""

    attention: SimulatedAttentionConfig

    @override
    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return the weights of self-attention, of head simulation and of feature simulation.

        Head simulation has k·(N·rN + (rN)²) + 2rN elements for the query, and for key and value the same
        with G instead of N; feature simulation has 2·(D·E + E² + 2E). Biases depend on `simulation_bias`.
        """
        attention = self.attention
        weights = super().weights(hidden_size, linear_bias=linear_bias)
        for base in attention.head_simulations().values():
            simulated, taps = attention.head_expansion * base, attention.kernel_size
            weights += self._map_weights("head_simulation", base * taps, simulated * taps, simulated)
        if attention.simulate_features:
            wide = attention.query_key_dim
            weights += 2 * self._map_weights("feature_simulation", attention.head_dim, wide, wide)
        return weights

    def _map_weights(self, term: str, expand: int, refine: int, rows: int) -> list[Weight]:
        """Return two matrices and their biases; a rank's gradients come from its local heads."""
        columns = (expand, refine, 1, 1) if self.attention.simulation_bias else (expand, refine)
        return [Weight(term, rows * width, partial_over="heads", summed_by="layer") for width in columns]

    @override
    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Return self-attention's traffic, with the exchange of heads instead of its gather for G < P."""
        if not self.attention.simulates_heads:
            return super().count_tensor_traffic(hidden_size, group)
        strategy = resolve_exchange(self.attention, tensor_parallel=group.ranks)
        return {
            "qkv": group.column_parallel_input(hidden_size),
            "head_simulation": exchange_traffic(self.attention, strategy, group),
            "projection": group.row_parallel_output(hidden_size),
        }

    @override
    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Return the forward FLOPs of one token by term; convolutions with all taps, padding included.

        The aggregation of blocks and the activation functions are not counted, like all element-wise
        operations.
        """
        attention = self.attention
        width, wide = attention.head_dim, attention.query_key_dim
        base_heads = attention.num_heads + attention.num_key_value_heads
        heads = 0
        for base in attention.head_simulations().values():
            simulated = attention.head_expansion * base
            heads += 2 * attention.kernel_size * simulated * (base + simulated) * width
        features = 0
        if attention.simulate_features:
            features = 2 * attention.head_expansion * base_heads * wide * (width + wide)
        return {
            **self.count_projection_flops(hidden_size),
            "head_simulation": heads,
            "feature_simulation": features,
            "scores": 2 * sequence_length * attention.num_simulated_heads * wide,
            "values": 2 * sequence_length * attention.num_simulated_heads * width,
        }

    @override
    def count_repeated_flops(self, *, device: Device, element_bytes: int) -> dict[str, int]:
        """Return what the fused kernels recompute, without the padding of tiles.

        In the forward pass, the first convolution is computed for each of the k taps of the second. In the
        backward pass, it is computed for the gradients of the columns and of the second weights
        (with many heads, once per tap); the input heads of the feature simulation are computed again; and so
        is y, in two kernels of the feature simulation. Heads that `all_to_all` received from other ranks are
        saved rather than recomputed, which is not considered here.
        """
        attention = self.attention
        if not is_fused(attention, device=device, element_bytes=element_bytes):
            return {}
        taps, width, wide = attention.kernel_size, attention.head_dim, attention.query_key_dim
        heads = 0
        for name, base in attention.head_simulations().items():
            many = attention.head_expansion * base
            first, second = (2 * taps * many * inputs * width for inputs in (base, many))
            one_by_one = taps // taps_at_once(taps, num_outputs=many, num_inputs=many)
            forward, backward = taps - 1, 1 + one_by_one
            heads += (forward + backward) * first
            if attention.simulate_features and name != "value":
                heads += taps * first + second
        terms = {"head_simulation": heads}
        if attention.simulate_features:
            base_heads = attention.num_heads + attention.num_key_value_heads
            terms["feature_simulation"] = 2 * 2 * attention.head_expansion * base_heads * wide * width
        return terms

    @override
    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Return `qkv` (the hidden state), head simulation, feature simulation, and core attention.

        If the simulation is recomputed, the projected heads are saved instead of its two terms, in `qkv`.
        The aggregation of blocks saves nothing; its result is in `projection`.
        """
        attention = self.attention
        simulation = SimulationActivations(attention, layer)
        terms = {"qkv": layer.local_bytes(hidden_size)}
        if "simulation" in layer.recomputed:
            terms["qkv"] += simulation.count_projected_bytes()
        else:
            if attention.simulates_heads:
                terms["head_simulation"] = simulation.count_head_bytes()
            if attention.simulate_features:
                terms["feature_simulation"] = simulation.count_feature_bytes()
        terms |= self.count_core_bytes(
            layer,
            value_bytes=simulation.count_value_bytes(),
            views=simulation.find_received_views(),
            columns_bytes=simulation.received_columns_bytes,
        )
        has_own_positions = layer.restarts and layer.batch > 1
        kernels_rotate = simulation.is_fused and attention.simulate_features and not has_own_positions
        if kernels_rotate and not attention.qk_norm:
            # The kernels apply rotary embeddings, with a table that the model has once.
            del terms["rotary"]
        elif attention.rotary == "before":
            terms["rotary"] = simulation.count_base_rotary_bytes()
        return terms

    @override
    def count_kv_cache_elements(self) -> dict[str, int]:
        """Return G·D for keys and for values; with `kv_cache=simulated` r·G·E and r·G·D."""
        attention = self.attention
        if attention.kv_cache == "base":
            return super().count_kv_cache_elements()
        simulated = attention.head_expansion * attention.num_key_value_heads
        return {"keys": simulated * attention.query_key_dim, "values": simulated * attention.head_dim}


class SimulationActivations:
    """The bytes that the simulation of one layer saves on the first tensor rank."""

    def __init__(self, attention: SimulatedAttentionConfig, layer: ActivationSpec) -> None:
        self.attention, self.layer = attention, layer
        self.is_fused = is_fused(attention, device=layer.device, element_bytes=layer.element_bytes)
        self.simulations = attention.head_simulations()
        self.base_heads = {
            "query": attention.num_heads,
            "key": attention.num_key_value_heads,
            "value": attention.num_key_value_heads,
        }
        exchanges = layer.tensor > 1 and attention.simulates_heads
        self.exchange = resolve_exchange(attention, tensor_parallel=layer.tensor) if exchanges else None
        # With all_to_all, query, key and value are received side by side, and are views of these columns.
        self.received_columns = self._count_received_columns() if self.exchange == "all_to_all" else None
        self.received_columns_bytes = layer.full_bytes(self.received_columns or 0)
        # Tokens of which the rank simulates heads.
        self.tokens = layer.tokens
        if self.exchange == "all_to_all":
            # If the ranks do not divide the tokens, the first rank has one token more than the last.
            self.tokens = -(-layer.tokens // layer.tensor)

    def count_projected_bytes(self) -> int:
        """Return the bytes of the rank's projected columns, and of queries if they are a copy."""
        attention, ranks = self.attention, self.layer.tensor
        if attention.simulates_heads:
            return self.layer.full_bytes(attention.qkv_width // ranks)
        queries, groups = self.base_heads["query"] // ranks, max(1, self.base_heads["key"] // ranks)
        is_gathered = self.base_heads["key"] < ranks
        columns = attention.qkv_width // (1 if is_gathered else ranks)
        copied = queries * attention.head_dim if 1 < groups < queries else 0
        return self.layer.full_bytes(columns + copied)

    def count_head_bytes(self) -> int:
        """Return the bytes of base heads, of what φ and the second maps save, and of copied weights."""
        attention = self.attention
        if self.is_fused:
            return self.layer.element_bytes * self.tokens * attention.qkv_width
        # Queries of several groups are not contiguous among the columns and are copied; others are views.
        is_copied = "query" in self.simulations and 1 < self.base_heads["key"] < self.base_heads["query"]
        has_views = len(self.simulations) > (1 if is_copied else 0)
        columns = (attention.qkv_width if has_views else 0) + (
            attention.num_heads * attention.head_dim if is_copied else 0
        )
        simulated = attention.head_expansion * sum(self.simulations.values()) * attention.head_dim
        simulated *= SAVED_BY_ACTIVATION[attention.head_activation]
        return self.layer.element_bytes * (self.tokens * (columns + simulated) + self._count_copied_weights())

    def count_base_rotary_bytes(self) -> int:
        """Return the bytes of cosines and sines for base heads, of each token that the rank simulates."""
        if "simulation" in self.layer.recomputed:
            return 0
        if self.attention.simulates_heads:
            return self.layer.element_bytes * self.tokens * self.attention.rotary_width
        return self.layer.rope_bytes(self.attention.rotary_width // 2)

    def find_received_views(self) -> frozenset[str]:
        """Return which heads are views of the received columns in core attention.

        Queries and keys are none if their features are simulated, or if they are rotated. Several heads of
        several sequences are copied by chunked attention.
        """
        layer = self.layer
        is_new = self.attention.simulate_features or self.attention.rotary == "after"
        copies = layer.backend == "chunked" and "attention" not in layer.recomputed
        if self.received_columns is None or is_new or (copies and layer.batch > 1 and layer.heads[1] > 1):
            return frozenset()
        return frozenset(self.simulations)

    def count_feature_bytes(self) -> int:
        """Return the bytes of D features per query and key head, and of the E features that φ saves."""
        heads = dict(zip(("query", "key"), self.layer.heads, strict=True))
        if self.is_fused:
            is_recomputed = self.attention.simulates_heads and self.exchange != "all_to_all"
            return (
                0 if is_recomputed else self.layer.full_bytes(sum(heads.values()) * self.attention.head_dim)
            )
        views = self._find_views()
        inputs = sum(count * self.attention.head_dim for name, count in heads.items() if name not in views)
        results = sum(heads.values()) * self.attention.query_key_dim
        results *= SAVED_BY_ACTIVATION[self.attention.feature_activation]
        return self.layer.full_bytes(inputs + results + (self.received_columns or 0 if views else 0))

    def count_value_bytes(self) -> int:
        """Return the bytes of the tensor that the value is a view of: itself, or all received columns."""
        heads = self.layer.heads[1]
        # Chunked attention needs a contiguous value, which several heads of several sequences are not.
        is_copied = "attention" not in self.layer.recomputed and self.layer.batch > 1 and heads > 1
        is_copied = is_copied and not self.attention.knocking_heads
        if self.received_columns is None or "value" not in self.simulations or is_copied:
            return self.layer.full_bytes(heads * self.attention.head_dim)
        features_save = self.attention.simulate_features and "simulation" not in self.layer.recomputed
        if features_save and not self.is_fused and self._find_views():
            return 0
        return self.layer.full_bytes(self.received_columns)

    def _find_views(self) -> list[str]:
        """Return which of query and key has one head on this rank, whose rows are a view of all columns."""
        names = zip(("query", "key"), self.layer.heads, strict=True)
        return [
            name for name, heads in names if self.received_columns and name in self.simulations and heads == 1
        ]

    def _count_received_columns(self) -> int:
        expansion = self.attention.head_expansion
        heads = sum(
            max(1, base // self.layer.tensor) * (expansion if name in self.simulations else 1)
            for name, base in self.base_heads.items()
        )
        return heads * self.attention.head_dim

    def _count_copied_weights(self) -> int:
        """Return the rank's rows of the second maps, which `gather` copies if they are in several blocks."""
        expansion = self.attention.head_expansion
        if self.exchange != "gather" or expansion == 1:
            return 0
        local = {name: base // self.layer.tensor for name, base in self.simulations.items()}
        return sum(
            expansion * local[name] * expansion * base * self.attention.kernel_size
            for name, base in self.simulations.items()
            if local[name] > 1
        )


def is_fused(attention: SimulatedAttentionConfig, *, device: Device, element_bytes: int) -> bool:
    """Return whether `attention.kernel` selects the fused kernels, if everything they need is installed."""
    if attention.kernel == "auto":
        return find_unfused_reason(attention, device=device, element_bytes=element_bytes) is None
    return attention.kernel == "fused"


def find_unfused_reason(
    attention: SimulatedAttentionConfig, *, device: Device, element_bytes: int
) -> str | None:
    """Return why `attention.kernel=auto` does not select the fused kernels; None if it does."""
    if device == "cpu":
        return "the fused kernels need a CUDA device"
    if element_bytes != ELEMENT_BYTES:
        return "the fused kernels are made for bfloat16"
    if attention.unfusable_field is not None:
        return f"the fused kernels do not support {attention.unfusable_field}"
    return find_misfit(attention)


def find_misfit(attention: SimulatedAttentionConfig) -> str | None:
    """Return why all weights and a tile do not fit in shared memory; None if they do."""
    for simulation, needed in count_shared_memory_bytes(attention).items():
        if needed > SHARED_MEMORY_BYTES:
            return (
                f"the fused {simulation} needs {needed // 1024} KiB of shared memory, "
                f"of which there are {SHARED_MEMORY_BYTES // 1024}"
            )
    return None


def count_shared_memory_bytes(attention: SimulatedAttentionConfig) -> dict[str, int]:
    """Return the shared memory of the backward kernels, which need the most, by simulation.

    Counted are all weights, and the tiles of inputs and results. tests/attention/fused checks that the
    count is at least the compiler's.
    """
    needed: dict[str, int] = {}
    for base in attention.head_simulations().values():
        few, many = padded_size(base), padded_size(attention.head_expansion * base)
        rows = max(TILE_ROWS, padded_size(attention.head_dim))
        weights = attention.kernel_size * many * (few + many)
        tiles = rows * (2 * many + few)
        needed["head simulation"] = max(needed.get("head simulation", 0), ELEMENT_BYTES * (weights + tiles))
    if attention.simulate_features:
        narrow, (main, rest) = padded_size(attention.head_dim), split_size(attention.query_key_dim)
        wide = main + rest
        needed["feature simulation"] = ELEMENT_BYTES * (wide * (narrow + wide) + TILE_ROWS * (narrow + main))
    return needed
