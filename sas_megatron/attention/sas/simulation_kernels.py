"""A layer's simulation, and its two implementations: torch's operations, and fused Triton kernels."""

from __future__ import annotations

import functools
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from typing_extensions import override

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.costs import find_misfit, find_unfused_reason
from sas_megatron.attention.sas.simulated_attention import (
    ResidualMapWeights,
    Simulation,
    SimulationShape,
    simulate_features,
    simulate_heads,
)
from sas_megatron.config.errors import FieldError
from sas_megatron.costs.attention_backend import Device

if TYPE_CHECKING:
    from sas_megatron.attention.sas.fused.features import Recomputation
    from sas_megatron.attention.sas.fused.heads import HeadShard

logger = logging.getLogger(__name__)

NAMES = ("query", "key", "value")
# Compute capability 8.0, which introduced the matrix instructions of the kernels.
LEAST_CAPABILITY = (8, 0)

# Selects base heads, given the number of base heads.
HeadSelection = Callable[[int], slice]


class HeadSource(NamedTuple):
    """The columns from which a rank has computed its heads, so that it can compute them again."""

    columns: torch.Tensor
    computed_heads: HeadSelection


class SimulationKernels(ABC):
    """Computes head and feature simulation of a rank's tokens. W = D(N + 2G) are the projected columns.

    Weights are given for all maps of a layer, by `heads.query`, `features.key` and so on.
    """

    # Whether `features` is called, and also applies rotary embeddings.
    applies_rope = False

    def __init__(self, attention: SimulatedAttentionConfig) -> None:
        self.attention = attention

    def split_columns(self, columns_TW: torch.Tensor) -> list[torch.Tensor]:
        """Split projected columns into query, key and value heads [T, N | G | G, D]."""
        groups = self.attention.num_key_value_heads
        queries = self.attention.num_heads // groups
        # Megatron-core's order: for each group its queries, its key, its value.
        grouped = columns_TW.unflatten(1, (groups, queries + 2, self.attention.head_dim))
        return [part.flatten(1, 2) for part in grouped.split([queries, 1, 1], dim=2)]

    def rotate_columns(
        self, columns_TW: torch.Tensor, rotate: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return projected columns whose queries and keys, [T, heads, D], have passed through `rotate`."""
        groups = self.attention.num_key_value_heads
        grouped = columns_TW.unflatten(1, (groups, -1, self.attention.head_dim))
        # In each group, the queries and the key precede the value.
        rotary, value = grouped.split([grouped.shape[2] - 1, 1], dim=2)
        rotated = rotate(rotary.flatten(1, 2)).view(rotary.shape)
        return torch.cat([rotated, value], dim=2).flatten(1)

    @abstractmethod
    def heads(
        self,
        columns_TW: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        computed_heads: HeadSelection,
    ) -> list[torch.Tensor]:
        """Simulate query, key and value heads [T, heads, D] from projected columns.

        Args:
            columns_TW: The projected columns of T tokens.
            weights: All weights of the layer; heads without weights are passed on once.
            computed_heads: Selects the base heads whose copies are computed.
        """

    @abstractmethod
    def features(
        self,
        name: str,
        heads_TMD: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        *,
        rope: torch.Tensor | None,
        source: HeadSource | None,
    ) -> torch.Tensor:
        """Simulate the features of query or key heads, [T, M, D] -> [T, M, E].

        Args:
            name: `query` or `key`.
            heads_TMD: Heads, simulated or repeated.
            weights: All weights of the layer.
            rope: Rotary angles [S, 1, 1, R] to apply; None to apply none.
            source: The columns from which to compute `heads_TMD` again; None if other ranks computed them.
        """


class PlainKernels(SimulationKernels):
    """Convolutions and linear maps of torch."""

    @override
    def heads(
        self,
        columns_TW: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        computed_heads: HeadSelection,
    ) -> list[torch.Tensor]:
        simulated = []
        for name, heads_TND in zip(NAMES, self.split_columns(columns_TW), strict=True):
            selected, map_weights = computed_heads(heads_TND.shape[1]), weights.get(f"heads.{name}")
            if map_weights is None:
                simulated.append(heads_TND[:, selected])
            else:
                heads = simulate_heads(
                    heads_TND,
                    map_weights,
                    activation=self.attention.head_activation,
                    base_heads=selected,
                )
                simulated.append(heads)
        return simulated

    @override
    def features(
        self,
        name: str,
        heads_TMD: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        *,
        rope: torch.Tensor | None,
        source: HeadSource | None,
    ) -> torch.Tensor:
        assert rope is None, "torch's operations do not apply rotary embeddings"
        activation = self.attention.feature_activation
        return simulate_features(heads_TMD, weights[f"features.{name}"], activation=activation)


class FusedKernels(SimulationKernels):
    """Triton kernels. The backward pass recomputes intermediate tensors from the projected columns."""

    def __init__(self, attention: SimulatedAttentionConfig) -> None:
        super().__init__(attention)
        self.applies_rope = attention.simulate_features
        # Imported here, since only these kernels need Triton.
        from sas_megatron.attention.sas.fused import features, heads

        self._heads, self._features = heads, features
        self.tiling = features.Tiling()

    @override
    def heads(
        self,
        columns_TW: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        computed_heads: HeadSelection,
    ) -> list[torch.Tensor]:
        shards = [self._shard(name, weights.get(f"heads.{name}"), computed_heads) for name in NAMES]
        return list(self._heads.simulate_heads(columns_TW, shards, tiling=self.tiling))

    @override
    def features(
        self,
        name: str,
        heads_TMD: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        *,
        rope: torch.Tensor | None,
        source: HeadSource | None,
    ) -> torch.Tensor:
        """Simulate features; with rotary embeddings, query and key features are stored in pair order."""
        simulated: torch.Tensor = self._features.simulate_features(
            heads_TMD,
            weights[f"features.{name}"],
            rope_table=None if rope is None else self._features.build_rope_table(rope),
            tiling=self.tiling,
            recomputation=None if source is None else self._recomputation(name, source, weights),
        )
        return simulated

    def _shard(
        self, name: str, weights: ResidualMapWeights | None, computed_heads: HeadSelection
    ) -> HeadShard:
        attention, width = self.attention, self.attention.head_dim
        groups = attention.num_key_value_heads
        queries = attention.num_heads // groups
        # Megatron-core's order: for each group its queries, its key, its value.
        first = {"query": 0, "key": queries, "value": queries + 1}[name] * width
        per_group = queries if name == "query" else 1
        columns = self._heads.HeadColumns(first, groups * per_group, per_group, (queries + 2) * width, width)
        return self._heads.HeadShard(columns, weights, computed_heads(columns.num_heads))

    def _recomputation(
        self, name: str, source: HeadSource, weights: Mapping[str, ResidualMapWeights]
    ) -> Recomputation:
        map_weights = weights.get(f"heads.{name}")

        def compute(columns_TW: torch.Tensor, *saved: torch.Tensor) -> torch.Tensor:
            shard = self._shard(name, ResidualMapWeights(*saved) if saved else None, source.computed_heads)
            heads: torch.Tensor = self._heads.compute_heads(columns_TW, shard, self.tiling)
            return heads if saved else heads.repeat(1, self.attention.head_expansion, 1)

        return self._features.Recomputation(compute, (source.columns, *(map_weights or ())))


def build_simulation(
    attention: SimulatedAttentionConfig, *, dtype: torch.dtype, device: torch.device | int
) -> Simulation:
    """Build the simulation of a layer, with uninitialized weights."""
    shape = SimulationShape(
        num_heads=attention.head_simulations(),
        expansion=attention.head_expansion,
        kernel_size=attention.kernel_size,
        head_dim=attention.head_dim,
        simulated_head_dim=attention.query_key_dim if attention.simulate_features else None,
        bias=attention.simulation_bias,
        head_activation=attention.head_activation,
        feature_activation=attention.feature_activation,
    )
    return Simulation(shape, dtype=dtype, device=device)


def check_kernel(attention: SimulatedAttentionConfig) -> None:
    """Check that `attention.kernel` can run, before Megatron-core builds the layer and replaces the error.

    Raises:
        FieldError: The fused kernels cannot run on this machine, or do not fit.
    """
    if attention.kernel == "fused":
        reason = find_misfit(attention) or _find_missing_requirement()
        if reason is not None:
            raise FieldError(
                "attention.kernel", "fused", f"cannot run here, since {reason}", "use auto or plain"
            )


def build_simulation_kernels(attention: SimulatedAttentionConfig, *, dtype: torch.dtype) -> SimulationKernels:
    """Build the implementation that `attention.kernel` selects; log the choice of `auto` with its reason.

    Raises:
        NotImplementedError: The fused kernels are selected for float64.
    """
    if attention.kernel == "auto":
        device: Device = "gpu" if torch.cuda.is_available() else "cpu"
        reason = find_unfused_reason(attention, device=device, element_bytes=dtype.itemsize)
        reason = reason or _find_missing_requirement()
        _log_once(f"attention.kernel=auto: {'fused' if reason is None else f'plain, since {reason}'}")
        if reason is not None:
            return PlainKernels(attention)
    if attention.kernel == "plain":
        return PlainKernels(attention)
    if dtype == torch.float64:
        raise NotImplementedError("the fused kernels accumulate in float32, and do not support float64")
    if attention.qk_norm and attention.rotary == "after":
        _log_once("attention.qk_norm=true: rotary embeddings follow the norm, outside of the fused kernels")
    return FusedKernels(attention)


@functools.lru_cache(maxsize=8)
def _log_once(message: str) -> None:
    """Log a message once, not for each layer."""
    logger.info("%s", message)


def _find_missing_requirement() -> str | None:
    """Return the first requirement of the fused kernels that this machine does not meet, if any.

    Triton's interpreter needs no GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < LEAST_CAPABILITY:
            return f"the GPU's compute capability is {major}.{minor}, below 8.0"
        return None
    import triton

    return None if triton.knobs.runtime.interpret else "the fused kernels need a CUDA device"
