"""Config of multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434). No torch.

The paper's n_h, d_h, d_h^R, d_c, d_c' are num_heads N, head_dim D, rotary_head_dim R, kv_lora_rank and
query_lora_rank here; V is the width of a value head, d_h in the paper.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig, InitialWeights

# σ of all learnable parameters, output projections included, of DeepSeek-V2 (section 3.1.2) and DeepSeek-V3
# (arXiv 2412.19437, section 4.2).
AUTHORS_STD = 0.006


class LatentAttentionConfig(AttentionConfig):
    """Keys and values are projected from one narrow latent per token; all heads share one rotary key."""

    uses_model_rotary: ClassVar[bool] = False
    dimension_steps: ClassVar[dict[str, int]] = {
        **AttentionConfig.dimension_steps,
        "rotary_head_dim": 8,
        "value_head_dim": 8,
        "kv_lora_rank": 8,
        "query_lora_rank": 8,
    }
    cache_dimensions: ClassVar[tuple[str, ...]] = ("kv_lora_rank",)

    kind: Literal["mla"] = Field(default="mla", description="Multi-head latent attention.")
    head_dim: int = Field(description="D, query/key features of a head without rotary embeddings.")
    rotary_head_dim: int = Field(
        description="R, further query/key features with rotary embeddings; the key's are shared by all heads."
    )
    value_head_dim: int | None = Field(default=None, description="V, features of a value head; null: D.")
    kv_lora_rank: int = Field(description="Width of the latent from which keys and values are projected.")
    query_lora_rank: int | None = Field(
        description="Width of the latent from which queries are projected; null: no latent for queries."
    )

    initialization: Literal["authors", "normal"] = Field(
        default="normal",
        description="authors: N(0, 0.006) for all matrices, as in DeepSeek-V2; normal: as for the model's "
        "other matrices.",
    )

    @override
    def initial_weights(self, name: str, full_shape: tuple[int, ...]) -> InitialWeights | None:
        return None if self.initialization == "normal" else InitialWeights("normal", AUTHORS_STD)

    @classmethod
    @override
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """Return DeepSeek-V2's proportions (section 3.1.2): R = D/2, latents of 4·D and of 3/10 of H."""
        step = cls.dimension_steps["query_lora_rank"]
        return {
            **super().defaults_from(base, hidden_size=hidden_size),
            "rotary_head_dim": 2 * (-(-base.head_dim // 4)),
            "kv_lora_rank": 4 * base.head_dim,
            "query_lora_rank": max(1, round(0.3 * hidden_size / step)) * step,
        }

    @model_validator(mode="after")
    def _check_latent(self) -> LatentAttentionConfig:
        self.require_positive("rotary_head_dim", "value_head_dim", "kv_lora_rank", "query_lora_rank")
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "must equal num_heads in latent attention",
                "omit it; kv_lora_rank decides the size of the KV cache",
                ("attention.num_kv_heads=null",),
            )
        if self.rotary_dim is not None:
            raise self.problem(
                "rotary_dim",
                "must be null in latent attention, which has separate features for positions",
                "use rotary_head_dim",
                ("attention.rotary_dim=null",),
            )
        if self.rotary_head_dim % 2:
            raise self.problem(
                "rotary_head_dim",
                "must be even, since rotary embeddings rotate pairs of features",
                f"use {self.rotary_head_dim + 1}",
                (f"attention.rotary_head_dim={self.rotary_head_dim + 1}",),
            )
        if self.value_width > self.query_key_dim:
            raise self.problem(
                "value_head_dim",
                f"must be at most head_dim + rotary_head_dim = {self.query_key_dim}",
                f"use {self.query_key_dim} or less",
                (f"attention.value_head_dim={self.query_key_dim}",),
            )
        return self

    @property
    @override
    def query_key_dim(self) -> int:
        """D + R, which also gives the scale of the scores, 1/√(D + R) (the paper's equation 18)."""
        return self.head_dim + self.rotary_head_dim

    @property
    @override
    def rotary_width(self) -> int:
        """R, the features of a query/key head with rotary embeddings; 0 without rotary embeddings."""
        return 0 if self.rotary == "none" else self.rotary_head_dim

    @property
    @override
    def value_width(self) -> int:
        """V, with its default resolved."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @override
    def resolved_fields(self) -> dict[str, Any]:
        return {**super().resolved_fields(), "value_head_dim": self.value_width}
