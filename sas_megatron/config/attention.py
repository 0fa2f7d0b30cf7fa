"""The `attention` section: what every variant states, and how a kind's name finds its class.

A variant is one file that subclasses `AttentionConfig`, plus one line in `KINDS`; a variant from
another package registers itself in the entry-point group `sas_megatron.attention` instead.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention_backend import Device
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.layer_pass import ActivationSpec, CoreAttentionSpec
from sas_megatron.config.section import Section, divisors
from sas_megatron.config.tensor_group import TensorGroup, Traffic, Weight, count_by_term

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

ENTRY_POINT_GROUP = "sas_megatron.attention"

# kind -> module:class, resolved when a config names it, so that config/ imports no variant.
KINDS: dict[str, str] = {
    "mha": "sas_megatron.attention.gqa.config:MultiHeadAttentionConfig",
    "gqa": "sas_megatron.attention.gqa.config:GroupedQueryAttentionConfig",
    "mqa": "sas_megatron.attention.gqa.config:MultiQueryAttentionConfig",
    "mfa": "sas_megatron.attention.mfa.config:FactorizedAttentionConfig",
    "mla": "sas_megatron.attention.mla.config:LatentAttentionConfig",
    "sas": "sas_megatron.attention.sas.config:SimulatedAttentionConfig",
    "tpa": "sas_megatron.attention.tpa.config:TensorProductAttentionConfig",
}


@dataclass(frozen=True)
class InitialWeights:
    """How a weight starts: N(0, scale), or uniform in ±scale; 0 for zeros."""

    distribution: Literal["normal", "uniform"]
    scale: float


class AttentionConfig(Section):
    """What is common to all variants; a variant adds its fields and says what it costs.

    Letters as in the SAS paper's reading here: N query heads, G key/value heads, D features a head,
    H hidden size, S sequence length, P tensor-parallel ranks.
    """

    section_name: ClassVar[str] = "attention"
    # Whether the layer turns queries and keys by the model's rotary angles, or has its own.
    uses_model_rotary: ClassVar[bool] = True
    # Whether queries, keys and values come of one projection, Megatron-core's.
    has_fused_qkv: ClassVar[bool] = True
    # Parts that `training.recompute_modules` may name, and the terms of FLOPs that each computes again.
    recomputable: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ("scores", "values")}
    # For fair matches (scaling/matching.py): the fields that may be solved for, each in multiples of what
    # suits the hardware; those that take up a difference in size; those that decide what decoding keeps.
    dimension_steps: ClassVar[dict[str, int]] = {"num_heads": 1, "head_dim": 8}
    size_dimensions: ClassVar[tuple[str, ...]] = ()
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_heads", "head_dim")

    kind: str = Field(description="Which variant; decides the other fields.")
    num_heads: int = Field(description="N, query heads.")
    num_kv_heads: int | None = Field(
        default=None, description="G, key/value heads; null: as many as num_heads."
    )
    head_dim: int = Field(description="D, features of one head.")
    rotary_dim: int | None = Field(
        default=None, description="Features of a query/key head that carry rotary positions; null: all."
    )
    dropout: float = Field(default=0.0, description="On the attention weights.")
    backend: Literal["auto", "fused", "unfused", "cudnn"] = Field(
        default="auto",
        description="fused: scaled-dot-product attention of torch; cudnn: that of cuDNN, on a GPU in "
        "bfloat16, whose values may have another width than the keys; unfused: plain products; auto: by "
        "chunks of queries where that is faster (on CPU, causal, float32, up to 1,024 tokens), otherwise "
        "fused.",
    )

    @model_validator(mode="after")
    def _check_common(self) -> AttentionConfig:
        self.require_positive("num_heads", "num_kv_heads", "head_dim", "rotary_dim")
        self.require_between(0.0, 1.0, "dropout")
        if self.num_heads % self.num_key_value_heads:
            raise self.problem(
                "num_kv_heads",
                f"must divide attention.num_heads={self.num_heads}",
                f"use one of {divisors(self.num_heads)}",
            )
        if self.uses_model_rotary:
            self._check_rotary()
        if self.backend == "cudnn" and (self.query_key_dim % 8 or self.value_width % 8):
            raise self.problem(
                "backend",
                f"takes features in eights, and queries and keys have {self.query_key_dim} of them, "
                f"values {self.value_width}",
                "use auto, or multiples of 8",
            )
        return self

    def _check_rotary(self) -> None:
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise self.problem(
                "rotary_dim", "must be even, since features turn in pairs", f"use {self.rotary_dim + 1}"
            )
        if self.rotary_width > self.query_key_dim:
            raise self.problem(
                "rotary_dim",
                f"must not exceed the {self.query_key_dim} features of a query/key head",
                f"use {self.query_key_dim} or less",
            )
        if self.rotary_width % 2:
            raise self.problem(
                "head_dim" if self.rotary_width == self.head_dim else "simulated_head_dim",
                "must be even, since its features turn in pairs by rotary positions",
                "use an even width, or set attention.rotary_dim",
            )

    @property
    def num_key_value_heads(self) -> int:
        """G, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def query_key_dim(self) -> int:
        """Features of a query/key head at the scores: D here, E for SAS."""
        return self.head_dim

    @property
    def value_width(self) -> int:
        """Features of a value head: D here, V for MLA."""
        return self.head_dim

    @property
    def qkv_width(self) -> int:
        """D(N + 2G), what Megatron-core's fused projection makes of a token."""
        return self.head_dim * (self.num_heads + 2 * self.num_key_value_heads)

    @property
    def rotary_width(self) -> int:
        """Features that carry rotary positions, with the default filled in."""
        return self.query_key_dim if self.rotary_dim is None else self.rotary_dim

    def check_tensor_parallel(self, tensor: int) -> None:
        """Raises `FieldError` where the heads cannot be shared by `tensor` ranks."""
        groups = self.num_key_value_heads
        if self.num_heads % tensor:
            raise self.problem(
                "num_heads",
                f"must be divisible by parallel.tensor={tensor}, so that each rank owns whole heads",
                f"set parallel.tensor to one of {divisors(self.num_heads)}",
            )
        if groups % tensor and tensor % groups:
            legal = [p for p in divisors(self.num_heads) if groups % p == 0 or p % groups == 0]
            raise FieldError(
                "attention.num_kv_heads",
                groups,
                f"must be a multiple or a divisor of parallel.tensor={tensor}",
                f"set parallel.tensor to one of {legal}",
            )
        if self.has_fused_qkv and groups < tensor and self.qkv_width % tensor:
            # With fewer key/value heads than ranks, Megatron-core shares out columns, not heads.
            raise self.problem(
                "head_dim",
                f"makes {self.qkv_width} columns of queries, keys and values, which parallel.tensor={tensor} "
                f"ranks with {groups} key/value heads must divide",
                f"use a multiple of {tensor}",
            )

    @property
    def num_attended_heads(self) -> int:
        """Heads of the scores: N here, r·N for SAS."""
        return self.num_heads

    @property
    def num_blocks(self) -> int:
        """Blocks of N attended heads whose results are averaged: 1 here, r for SAS."""
        return self.num_attended_heads // self.num_heads

    def check_context_parallel(self, tensor: int, context: int) -> None:
        """Raises `FieldError` where a tensor rank's heads cannot be shared by `context` ranks."""
        heads = self.num_attended_heads // tensor
        if heads % context:
            raise FieldError(
                "parallel.context",
                context,
                f"must divide the {heads} heads that each of parallel.tensor={tensor} ranks attends with",
                f"use one of {divisors(heads)}",
            )

    def resolved_fields(self) -> dict[str, Any]:
        """What the fields that may be left open come to, by field."""
        filled = {"num_kv_heads": self.num_key_value_heads}
        return {**filled, "rotary_dim": self.rotary_width} if self.uses_model_rotary else filled

    @classmethod
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """The fields of a variant in the place of `base`, where a study names no more than its kind."""
        return {"num_heads": base.num_heads, "head_dim": base.head_dim}

    def initial_weights(self, name: str, whole_shape: tuple[int, ...]) -> InitialWeights | None:
        """How a matrix of the layer starts, where the variant's paper says so; None: as the model's others.

        Args:
            name: Within the attention layer, such as `linear_proj.weight`.
            whole_shape: Over all tensor ranks, [out, in].
        """
        return None

    def transformer_options(self) -> dict[str, Any]:
        """Further fields of Megatron-core's `TransformerConfig`, or of `transformer_config_type`."""
        return {}

    def transformer_config_type(self) -> type[TransformerConfig]:
        """`TransformerConfig`, or the class derived from it that the variant's module needs."""
        from megatron.core.transformer.transformer_config import TransformerConfig

        found: type[TransformerConfig] = TransformerConfig
        return found

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Numbers that decoding keeps of each token and layer, as named terms that sum."""
        raise NotImplementedError

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """One layer's, in the order in which its module registers them, but for the output projection, which
        it has first. By default `qkv`, H·D(N + 2G), and `projection`, N·D·H, with their biases.
        """
        width = self.qkv_width
        qkv = [Weight("qkv", hidden_size * width, sharded=True)]
        if linear_bias:
            qkv.append(Weight("qkv", width, sharded=True))
        return [*qkv, *self.output_weights(hidden_size, linear_bias=linear_bias)]

    def count_parameters(self, hidden_size: int, *, linear_bias: bool) -> dict[str, int]:
        """Parameters of one layer's attention, as named terms that sum."""
        return count_by_term(self.weights(hidden_size, linear_bias=linear_bias))

    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Bytes of activations that a rank sends over the tensor group for one layer and microbatch, by term.

        By default: into `qkv` go the H columns of the residual, out of `projection` come as many. With
        fewer key/value heads than ranks, G < P, Megatron-core gathers the D(N + 2G) projected columns.
        (What the sums of `weights`' gradients send, those say.)
        """
        qkv = group.into_columns(hidden_size)
        if self.num_key_value_heads < group.ranks:
            qkv += group.gathered(self.qkv_width)
        return {"qkv": qkv, "projection": group.out_of_rows(hidden_size)}

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Forward FLOPs of one token in one layer, as named terms that sum.

        A multiply-add is two; scores and values are counted in full, without the causal half.
        """
        raise NotImplementedError

    def count_repeated_flops(self, *, device: Device, element_bytes: int) -> dict[str, int]:
        """FLOPs of one token in one layer that its kernels spend on computing again, by term.

        Beside those of `training.recompute`, and those of the core attention.
        """
        return {}

    def output_weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Those of the output projection, row parallel from the value heads of all query heads."""
        elements = self.num_heads * self.value_width * hidden_size
        weights = [Weight("projection", elements, sharded=True)]
        return (
            [*weights, Weight("projection", hidden_size, partial_over="tokens")] if linear_bias else weights
        )

    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Bytes that one layer's attention keeps of a microbatch for its backward pass, as terms that sum.

        By default those of Megatron-core's own module: `qkv`, the hidden state that the fused projection
        reads; `rotary`, sines and cosines; `attention`, from queries, keys and values to the result; and
        `projection`, the result, where the attention does not keep it already.
        """
        # The value is a view of what the projection made: all columns, where ranks outnumber its heads.
        shared_by = layer.tensor if self.num_key_value_heads >= layer.tensor else 1
        return {
            "qkv": layer.own(hidden_size),
            **self.count_core_bytes(layer, value_bytes=layer.whole(self.qkv_width // shared_by)),
        }

    def count_core_bytes(self, layer: ActivationSpec, *, value_bytes: int) -> dict[str, int]:
        """Terms `rotary`, `attention` and `projection`.

        Args:
            layer: The pass.
            value_bytes: Of the whole tensor that the value, as it comes to the core attention, is a view of.
        """
        core = CoreAttentionSpec(
            layer,
            query_key_width=self.query_key_dim,
            value_width=self.value_width,
            value_bytes=value_bytes,
            drops=self.dropout > 0,
        )
        return {"rotary": layer.tables(self.rotary_width // 2), **core.count_bytes()}

    def count_projection_flops(self, hidden_size: int) -> dict[str, int]:
        """Terms `qkv` and `projection` in forward FLOPs of one token."""
        output_width = self.head_dim * self.num_heads
        return {"qkv": 2 * hidden_size * self.qkv_width, "projection": 2 * output_width * hidden_size}

    def build_spec(self) -> ModuleSpec:
        """The Megatron-core spec of this variant's self-attention module."""
        raise NotImplementedError


def resolve_kind(kind: object) -> type[AttentionConfig]:
    """The config class of an attention kind; a built-in one before an entry point of the same name.

    Raises:
        UserError: no built-in kind and no entry point has that name.
    """
    if isinstance(kind, str) and kind in KINDS:
        place = KINDS[kind]
    else:
        # Looked up last: it reads the metadata of every installed package, and sweeps build many configs.
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        registered = {point.name: point.value for point in points}
        if not isinstance(kind, str) or kind not in registered:
            names = ", ".join(sorted({*KINDS, *registered}))
            raise FieldError("attention.kind", kind, "is not a known variant", f"use one of {names}")
        place = registered[kind]
    resolved: type[AttentionConfig] = pkgutil.resolve_name(place)
    return resolved


def parse_attention(value: Any) -> AttentionConfig:
    """Builds the section from the mapping in a config file, by its `kind`."""
    if isinstance(value, AttentionConfig):
        return value
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"attention: needs a kind; use one of {', '.join(sorted(KINDS))}")
    return resolve_kind(value["kind"]).model_validate(value)
