"""What the benchmarks of attention measure; the letters are those of the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sas_megatron.attention.gqa.config import MultiHeadAttentionConfig
from sas_megatron.attention.sas.config import SimulatedAttentionConfig


@dataclass(frozen=True)
class BlockShape:
    """A block of self-attention on whole sequences, multi-head and simulated."""

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

    @property
    def num_tokens(self) -> int:
        """T = S·B."""
        return self.sequence_length * self.batch_size

    def simulated(self, **fields: Any) -> SimulatedAttentionConfig:
        """The SAS block."""
        return SimulatedAttentionConfig(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            head_expansion=self.head_expansion,
            simulated_head_dim=self.simulated_head_dim,
            kernel_size=self.kernel_size,
            **fields,
        )

    def multi_head(self, **fields: Any) -> MultiHeadAttentionConfig:
        """The block that SAS is built on."""
        return MultiHeadAttentionConfig(num_heads=self.num_heads, head_dim=self.head_dim, **fields)
