"""The two ways to compute the simulation of a layer: torch's own operations, and fused kernels."""

from __future__ import annotations

import functools
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.feature_simulation import simulate_features
from sas_megatron.attention.sas.fused.head_parts import HeadColumns, HeadPart
from sas_megatron.attention.sas.fused.residual_weights import ResidualMapWeights
from sas_megatron.attention.sas.head_simulation import simulate_heads
from sas_megatron.attention.sas.kernel_choice import reason_not_to_fit, reason_not_to_fuse
from sas_megatron.config.attention_backend import Device
from sas_megatron.config.errors import FieldError

if TYPE_CHECKING:
    from sas_megatron.attention.sas.fused.features import Recomputation

logger = logging.getLogger(__name__)

NAMES = ("query", "key", "value")
# The matrix instructions that the kernels are compiled to.
LEAST_CAPABILITY = (8, 0)


class HeadSource(NamedTuple):
    """What a rank computed heads from, all on its own, so that it can again."""

    columns: torch.Tensor
    base_heads_to_simulate: Callable[[int], slice]


class SimulationKernels(ABC):
    """Computes the simulation of tokens at hand; weights by `heads.query`, `features.key` and so on."""

    # Whether `features` turns them by rotary positions, too.
    turns: ClassVar[bool]

    def __init__(self, attention: SimulatedAttentionConfig) -> None:
        self.attention = attention

    def split_columns(self, columns_TC: torch.Tensor) -> list[torch.Tensor]:
        """Projected columns [T, (N+2G)·D] -> query, key and value heads [T, N | G | G, D]."""
        groups = self.attention.num_key_value_heads
        queries = self.attention.num_heads // groups
        # Megatron-core's order: each group's queries, its key, its value.
        grouped = columns_TC.unflatten(1, (groups, queries + 2, self.attention.head_dim))
        return [part.flatten(1, 2) for part in grouped.split([queries, 1, 1], dim=2)]

    @abstractmethod
    def heads(
        self,
        columns_TC: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        base_heads_to_simulate: Callable[[int], slice],
    ) -> list[torch.Tensor]:
        """Projected columns [T, (N+2G)·D] -> query, key and value [T, heads, D].

        Each with the copies of those base heads that `base_heads_to_simulate` says, of how many there are; r
        copies where its heads are simulated, otherwise one.
        """

    @abstractmethod
    def features(
        self,
        name: str,
        heads_TMD: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        *,
        angles: torch.Tensor | None,
        source: HeadSource | None,
    ) -> torch.Tensor:
        """Query or key heads [T, m, D] -> [T, m, E].

        Args:
            name: `query` or `key`.
            heads_TMD: Simulated, or repeated.
            weights: All of the layer.
            angles: Megatron-core's [S, 1, 1, R], to turn the features by; None: they are not turned.
            source: What `heads_TMD` came from; None: from other ranks.
        """


class PlainKernels(SimulationKernels):
    """Convolutions and linear maps of torch."""

    turns = False

    def heads(
        self,
        columns_TC: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        base_heads_to_simulate: Callable[[int], slice],
    ) -> list[torch.Tensor]:
        """As the base class says."""
        simulated = []
        for name, heads_TCD in zip(NAMES, self.split_columns(columns_TC), strict=True):
            here, own = base_heads_to_simulate(heads_TCD.shape[1]), weights.get(f"heads.{name}")
            simulated.append(
                heads_TCD[:, here] if own is None else simulate_heads(heads_TCD, own, base_heads=here)
            )
        return simulated

    def features(
        self,
        name: str,
        heads_TMD: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        *,
        angles: torch.Tensor | None,
        source: HeadSource | None,
    ) -> torch.Tensor:
        """As the base class says; they are never turned here."""
        assert angles is None
        return simulate_features(heads_TMD, weights[f"features.{name}"])


class FusedKernels(SimulationKernels):
    """Triton kernels. The backward pass has the columns, and computes what lies between again."""

    turns = True

    def __init__(self, attention: SimulatedAttentionConfig) -> None:
        super().__init__(attention)
        # Here, since only who uses them needs Triton.
        from sas_megatron.attention.sas.fused import features, heads, tiling

        self._heads, self._features = heads, features
        self.tiling = tiling.Tiling()

    def heads(
        self,
        columns_TC: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        base_heads_to_simulate: Callable[[int], slice],
    ) -> list[torch.Tensor]:
        """As the base class says."""
        parts = [self._part(name, weights.get(f"heads.{name}"), base_heads_to_simulate) for name in NAMES]
        return list(self._heads.simulate_heads(columns_TC, parts, tiling=self.tiling))

    def features(
        self,
        name: str,
        heads_TMD: torch.Tensor,
        weights: Mapping[str, ResidualMapWeights],
        *,
        angles: torch.Tensor | None,
        source: HeadSource | None,
    ) -> torch.Tensor:
        """As the base class says; turned features are in pair order, query and key alike."""
        simulated: torch.Tensor = self._features.simulate_features(
            heads_TMD,
            weights[f"features.{name}"],
            turns=None if angles is None else self._features.turns_of(angles),
            tiling=self.tiling,
            recomputation=None if source is None else self._recomputation(name, source, weights),
        )
        return simulated

    def _part(
        self, name: str, weights: ResidualMapWeights | None, base_heads_to_simulate: Callable[[int], slice]
    ) -> HeadPart:
        attention, width = self.attention, self.attention.head_dim
        groups = attention.num_key_value_heads
        queries = attention.num_heads // groups
        # Megatron-core's order: each group's queries, its key, its value.
        first = {"query": 0, "key": queries, "value": queries + 1}[name] * width
        per_group = queries if name == "query" else 1
        columns = HeadColumns(first, groups * per_group, per_group, (queries + 2) * width, width)
        return HeadPart(columns, weights, base_heads_to_simulate(columns.num_heads))

    def _recomputation(
        self, name: str, source: HeadSource, weights: Mapping[str, ResidualMapWeights]
    ) -> Recomputation:
        own = weights.get(f"heads.{name}")

        def compute(columns_TC: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
            part = self._part(
                name, ResidualMapWeights(*kept) if kept else None, source.base_heads_to_simulate
            )
            heads: torch.Tensor = self._heads.compute_heads(columns_TC, part, self.tiling)
            return heads if kept else heads.repeat(1, self.attention.head_expansion, 1)

        return self._features.Recomputation(compute, (source.columns, *(own or ())))


def check_kernel(attention: SimulatedAttentionConfig) -> None:
    """Before a layer is built, since Megatron-core turns what that raises into another error.

    Raises:
        FieldError: `attention.kernel=fused` cannot run here.
    """
    if attention.kernel == "fused":
        reason = reason_not_to_fit(attention) or _what_is_missing()
        if reason is not None:
            raise FieldError(
                "attention.kernel", "fused", f"cannot run here, since {reason}", "use auto or plain"
            )


def build_simulation_kernels(attention: SimulatedAttentionConfig, *, dtype: torch.dtype) -> SimulationKernels:
    """As `attention.kernel` says; what `auto` chose, and why, is logged."""
    if attention.kernel == "auto":
        device: Device = "gpu" if torch.cuda.is_available() else "cpu"
        reason = reason_not_to_fuse(attention, device=device, element_bytes=dtype.itemsize)
        reason = reason or _what_is_missing()
        _log_choice("fused" if reason is None else f"plain, since {reason}")
        return FusedKernels(attention) if reason is None else PlainKernels(attention)
    if attention.kernel == "plain":
        return PlainKernels(attention)
    if dtype == torch.float64:
        raise NotImplementedError("the fused kernels add up in float32")
    return FusedKernels(attention)


@functools.lru_cache(maxsize=8)
def _log_choice(choice: str) -> None:
    """Once, not for each layer."""
    logger.info("attention.kernel=auto: %s", choice)


def _what_is_missing() -> str | None:
    """Of what the fused kernels need; Triton's interpreter does without a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < LEAST_CAPABILITY:
            return f"the GPU's compute capability is {major}.{minor}, and not 8.0 or more"
        return None
    import triton

    return None if triton.knobs.runtime.interpret else "the fused kernels need a CUDA device"
