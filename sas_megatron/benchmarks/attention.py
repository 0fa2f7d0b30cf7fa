"""Time of a self-attention block, forward and backward: SAS here, SAS literally, and multi-head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from sas_megatron.attention.grouped import MultiHeadAttentionConfig
from sas_megatron.attention.simulated import SimulatedAttentionConfig
from sas_megatron.benchmarks.literal_attention import LiteralSimulatedAttention
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.parallel.topology import Topology

# Between our block and the literal one, norm over norm: rounding, or the two do not compute the same.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class BlockShape:
    """What is measured; the letters are those of the operator."""

    num_heads: int = 12
    head_expansion: int = 3
    head_dim: int = 64
    simulated_head_dim: int = 96
    kernel_size: int = 3
    sequence_length: int = 512
    batch_size: int = 2

    @property
    def hidden_size(self) -> int:
        """H = N·D."""
        return self.num_heads * self.head_dim

    def simulated(self) -> SimulatedAttentionConfig:
        """The SAS block."""
        return SimulatedAttentionConfig(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            head_expansion=self.head_expansion,
            simulated_head_dim=self.simulated_head_dim,
            kernel_size=self.kernel_size,
        )

    def multi_head(self) -> MultiHeadAttentionConfig:
        """The block that SAS is built on."""
        return MultiHeadAttentionConfig(num_heads=self.num_heads, head_dim=self.head_dim)


def measure_attention(
    shape: BlockShape, topology: Topology, *, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Times the three blocks in turn, forward and backward.

    Returns:
        Median seconds by block, and the median of the ratios of neighbouring runs (each round times
        every block once, so that a drifting machine drifts for all).

    Raises:
        RuntimeError: our block and the literal one differ by more than rounding.
    """
    torch.manual_seed(1)
    ours = _build_block(shape.simulated(), shape, dtype)
    literal = LiteralSimulatedAttention(shape.hidden_size, shape.simulated()).to(topology.device, dtype)
    _share_weights(literal, ours)
    hidden = torch.randn(
        shape.sequence_length, shape.batch_size, shape.hidden_size, device=topology.device, dtype=dtype
    )
    rotary = RotaryEmbedding(shape.simulated_head_dim, 1.0)(shape.sequence_length)
    angles = rotary[:, 0, 0].to(dtype)
    multi_head = _build_block(shape.multi_head(), shape, dtype)
    rotary_multi_head = RotaryEmbedding(shape.head_dim, 1.0)(shape.sequence_length)
    blocks: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sas": lambda x: ours(x, None, rotary_pos_emb=rotary)[0],
        "literal": lambda x: literal(x, angles),
        "multi_head": lambda x: multi_head(x, None, rotary_pos_emb=rotary_multi_head)[0],
    }
    difference = _difference(blocks["sas"](hidden), blocks["literal"](hidden))
    if difference > LARGEST_DIFFERENCE[dtype]:
        raise RuntimeError(
            f"the block and its literal form differ by {difference:.1e}; there is nothing to compare"
        )
    seconds = _time_in_turn(blocks, hidden, repeats=repeats)
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "literal_over_sas": _median_ratio(seconds["literal"], seconds["sas"]),
        "sas_over_multi_head": _median_ratio(seconds["sas"], seconds["multi_head"]),
        "relative_difference": difference,
        "repeats": repeats,
    }


def _build_block(attention: AttentionConfig, shape: BlockShape, dtype: torch.dtype) -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_key_value_heads,
        kv_channels=attention.head_dim,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        apply_rope_fusion=True,
    )
    return build_module(attention.build_spec(), config=config, layer_number=1)


@torch.no_grad()
def _share_weights(literal: LiteralSimulatedAttention, ours: Any) -> None:
    ours.linear_qkv.weight.copy_(literal.linear_qkv.weight)
    ours.linear_proj.weight.copy_(literal.linear_proj.weight)
    for kind in ("heads", "features"):
        for name, source in getattr(literal, kind).items():
            target = getattr(ours.simulation, kind)[name]
            for part in ("expand", "refine"):
                getattr(target, part).copy_(getattr(source, part).weight)
                getattr(target, f"{part}_bias").copy_(getattr(source, part).bias)


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((actual - expected).norm() / expected.norm())


def _time_in_turn(
    blocks: dict[str, Callable[[torch.Tensor], torch.Tensor]], hidden: torch.Tensor, *, repeats: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for round_number in range(repeats + 2):
        for name, block in blocks.items():
            elapsed = _time_once(block, hidden)
            if round_number >= 2:  # the first two warm up
                seconds[name].append(elapsed)
    return seconds


def _time_once(block: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> float:
    leaf = hidden.detach().requires_grad_()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    output = block(leaf)
    output.backward(torch.ones_like(output))
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
