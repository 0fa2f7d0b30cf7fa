"""The `attention` section: the fields and rules that all variants share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention_kinds import KINDS, resolve_part
from sas_megatron.config.errors import UserError
from sas_megatron.config.section import Section, divisors, largest_at_most

# Fields of the modifiers, which every variant supports (attention/modifiers.py); all are off by default.
MODIFIERS = ("qk_norm", "knocking_heads", "output_norm", "output_gate")


@dataclass(frozen=True)
class InitialWeights:
    """The initial weights: N(0, scale), uniform in ±scale, or scale times the identity."""

    distribution: Literal["normal", "uniform", "identity"]
    scale: float


class AttentionConfig(Section):
    """Fields and rules that all attention variants share.

    Letters: N query heads, G key/value heads, D features of a head, H hidden size, S sequence length,
    P tensor ranks.

    Attributes:
        uses_model_rotary: Whether the layer uses the model's rotary embedding, rather than its own.
        rotary_choices: The values of `rotary` that the variant supports.
        has_fused_qkv: Whether queries, keys and values come from Megatron-core's fused projection.
        supports_qkv_bias: Whether `qkv_bias` adds biases to these projections.
        recomputable: The parts that `training.recompute_modules` may name, with the FLOP terms of each.
        dimension_steps: For matching (scaling/matching.py), the fields that may be solved for, with a step
            that suits the hardware.
        size_dimensions: The fields that matching changes to reach a number of parameters or FLOPs.
        cache_dimensions: The fields that decide the size of the KV cache.
    """

    section_name: ClassVar[str] = "attention"
    uses_model_rotary: ClassVar[bool] = True
    rotary_choices: ClassVar[tuple[str, ...]] = ("after", "none")
    has_fused_qkv: ClassVar[bool] = True
    supports_qkv_bias: ClassVar[bool] = False
    recomputable: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ("scores", "values")}
    dimension_steps: ClassVar[dict[str, int]] = {"num_heads": 1, "head_dim": 8}
    size_dimensions: ClassVar[tuple[str, ...]] = ()
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_heads", "head_dim")

    kind: str = Field(description="The attention variant, which decides the other fields.")
    num_heads: int = Field(description="N, the number of query heads.")
    num_kv_heads: int | None = Field(
        default=None, description="G, the number of key/value heads; null: equal to num_heads."
    )
    head_dim: int = Field(description="D, the number of features of a head.")
    rotary: Literal["after", "before", "none"] = Field(
        default="after",
        description="Rotary embeddings of queries and keys. after: on the heads of core attention; before: "
        "on base heads, before SAS simulates heads from them; none: no position embeddings.",
    )
    rotary_dim: int | None = Field(
        default=None, description="Features of a query/key head with rotary embeddings; null: all."
    )
    dropout: float = Field(default=0.0, description="Dropout probability of attention weights.")
    backend: Literal["auto", "fused", "unfused", "cudnn"] = Field(
        default="auto",
        description="fused: torch's scaled-dot-product attention; cudnn: the same with cuDNN's kernels, on a "
        "GPU in bfloat16, without padding values to the width of keys; unfused: separate matrix products; "
        "auto: by chunks of queries where that is faster (on a CPU, causal, float32, up to 1,024 tokens), "
        "otherwise fused.",
    )
    qkv_bias: bool = Field(
        default=False,
        description="Add biases to the projections of queries, keys and values only, as Qwen2 does; "
        "model.linear_bias adds them to all projections.",
    )
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys before rotary embeddings.")
    knocking_heads: bool = Field(
        default=False, description="A gated map of D×D of each value head, shared by all heads."
    )
    output_norm: bool = Field(
        default=False, description="RMSNorm of each head's result, before the output gate."
    )
    output_gate: Literal["none", "headwise", "elementwise"] = Field(
        default="none",
        description="A factor σ(X·W) of each head's result, or of each of its features, from the layer's "
        "input X.",
    )

    @model_validator(mode="after")
    def _check_common(self) -> AttentionConfig:
        self.require_positive("num_heads", "num_kv_heads", "head_dim", "rotary_dim")
        self.require_between(0.0, 1.0, "dropout")
        if self.num_heads % self.num_key_value_heads:
            choices = divisors(self.num_heads)
            raise self.problem(
                "num_kv_heads",
                f"must divide attention.num_heads={self.num_heads}",
                f"use one of {choices}",
                (f"attention.num_kv_heads={largest_at_most(self.num_kv_heads or 1, choices)}",),
            )
        if self.qkv_bias and not self.supports_qkv_bias:
            raise self.problem(
                "qkv_bias",
                f"is not supported by attention.kind={self.kind}",
                "omit it, or use one of the kinds mha, gqa, mqa, diff, sas",
            )
        self._check_rotary()
        return self

    def _check_rotary(self) -> None:
        if self.rotary not in self.rotary_choices:
            choices = " or ".join(self.rotary_choices)
            raise self.problem(
                "rotary",
                f"must be {choices} with attention.kind={self.kind}",
                "use after",
                ("attention.rotary=after",),
            )
        if self.rotary == "none" and self.rotary_dim is not None:
            raise self.problem(
                "rotary_dim",
                "must be null if attention.rotary=none",
                "omit it",
                ("attention.rotary_dim=null",),
            )
        if not self.uses_model_rotary:
            return
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise self.problem(
                "rotary_dim",
                "must be even, since rotary embeddings rotate pairs of features",
                f"use {self.rotary_dim + 1}",
                (f"attention.rotary_dim={self.rotary_dim + 1}",),
            )
        if self.rotary_width > self.rotated_head_dim:
            raise self.problem(
                "rotary_dim",
                f"must not exceed the {self.rotated_head_dim} features of a query/key head",
                f"use {self.rotated_head_dim} or less",
                (f"attention.rotary_dim={self.rotated_head_dim}",),
            )
        if self.rotary_width % 2:
            raise self.problem(
                "head_dim" if self.rotary_width == self.head_dim else "simulated_head_dim",
                "must be even, since rotary embeddings rotate pairs of its features",
                "use an even width, or set attention.rotary_dim or attention.rotary=none",
                (f"attention.rotary_dim={self.rotary_width - 1}",),
            )

    @property
    def num_key_value_heads(self) -> int:
        """G, with its default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def query_key_dim(self) -> int:
        """Features of a query/key head in core attention: D, for SAS E."""
        return self.head_dim

    @property
    def value_width(self) -> int:
        """Features of a value head: D, for MLA V."""
        return self.head_dim

    @property
    def num_query_heads(self) -> int:
        """Query heads that are projected: N, for differential attention 2N."""
        return self.num_heads

    @property
    def qkv_width(self) -> int:
        """D(N + 2G), the columns of Megatron-core's fused projection."""
        return self.head_dim * (self.num_query_heads + 2 * self.num_key_value_heads)

    @property
    def rotated_head_dim(self) -> int:
        """Features of the heads to which rotary embeddings are applied: those of core attention, or D."""
        return self.head_dim if self.rotary == "before" else self.query_key_dim

    @property
    def rotary_width(self) -> int:
        """Features with rotary embeddings, with the default resolved; 0 without rotary embeddings."""
        if self.rotary == "none":
            return 0
        return self.rotated_head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def num_attended_heads(self) -> int:
        """Query heads in core attention: those projected, for SAS r·N."""
        return self.num_query_heads

    @property
    def num_blocks(self) -> int:
        """Blocks of N heads whose results are averaged: 1, for SAS r."""
        return self.num_attended_heads // self.num_query_heads

    @property
    def is_modified(self) -> bool:
        """Whether any modifier is on."""
        return any(getattr(self, name) not in (False, "none") for name in MODIFIERS)

    def resolved_fields(self) -> dict[str, Any]:
        """Return the values of optional fields with their defaults resolved."""
        fields: dict[str, Any] = {"num_kv_heads": self.num_key_value_heads}
        return {**fields, "rotary_dim": self.rotary_width or None} if self.uses_model_rotary else fields

    @classmethod
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """Return the fields of a variant that replaces `base` in a study that names only its kind.

        A kind whose groups may be solved for (`dimension_steps`) has those of the base.
        """
        fields = {"num_heads": base.num_heads, "head_dim": base.head_dim}
        groups = base.num_key_value_heads
        if "num_kv_heads" in cls.dimension_steps and groups != base.num_heads:
            fields["num_kv_heads"] = groups
        return fields

    def initial_weights(self, name: str, full_shape: tuple[int, ...]) -> InitialWeights | None:
        """Return the initial distribution of a matrix by the variant's paper; None for the model's default.

        Args:
            name: Name within the attention layer, such as `linear_proj.weight`.
            full_shape: Shape [out, in] over all tensor ranks.
        """
        return None


def resolve_kind(kind: object) -> type[AttentionConfig]:
    """Return the config class of an attention kind.

    Raises:
        FieldError: The kind is unknown, or its package registers it by the former contract.
    """
    resolved: type[AttentionConfig] = resolve_part(kind, "config")
    return resolved


def parse_attention(value: Any) -> AttentionConfig:
    """Build the section from a mapping in a config file, by its `kind`.

    Raises:
        UserError: The mapping has no kind or an unknown one, or a field breaks a rule.
    """
    if isinstance(value, AttentionConfig):
        return value
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"attention: needs a kind; use one of {', '.join(sorted(KINDS))}")
    return resolve_kind(value["kind"]).model_validate(value)
