"""Config of tensor product attention, TPA (T6, arXiv 2501.06425). No torch.

The queries of all heads of a token are a sum of R outer products of a vector over the heads (A) and a vector
over the features (B), both linear in the hidden state; keys and values likewise. Decoding caches the factors
rather than the heads. The paper's h, d_h and d are N, D and H here.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig, InitialWeights

# The ranks of the paper's models.
DEFAULT_QUERY_RANK, DEFAULT_KEY_VALUE_RANK = 6, 2


class TensorProductAttentionConfig(AttentionConfig):
    """Queries, keys and values of N heads as sums of R products of a head factor and a feature factor.

    Each head has its own keys and values; there are no groups. The factors have no biases, as in the paper;
    `model.linear_bias` adds one to the output projection only.
    """

    dimension_steps: ClassVar[dict[str, int]] = {
        **AttentionConfig.dimension_steps,
        "query_rank": 1,
        "key_rank": 1,
        "value_rank": 1,
    }
    # Factors have few parameters, so the authors add heads to match another attention.
    size_dimensions: ClassVar[tuple[str, ...]] = ("num_heads",)
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_heads", "key_rank", "value_rank")

    kind: Literal["tpa"] = Field(default="tpa", description="Tensor product attention.")
    factorize_query: bool = Field(
        default=True, description="false: the paper's KV-only form, with an ordinary query projection."
    )
    query_rank: int | None = Field(
        default=None, description="R_q, products in a query; null: 6, or none if it is not factorized."
    )
    key_rank: int = Field(default=DEFAULT_KEY_VALUE_RANK, description="R_k, products in a key.")
    value_rank: int = Field(default=DEFAULT_KEY_VALUE_RANK, description="R_v, products in a value.")
    initialization: Literal["authors", "normal"] = Field(
        default="authors",
        description="authors: Xavier uniform for factors as in the authors' code, zeros for the output "
        "projection; normal: as for the model's other matrices.",
    )

    @model_validator(mode="after")
    def _check_tensor_product(self) -> TensorProductAttentionConfig:
        self.require_positive("query_rank", "key_rank", "value_rank")
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "must equal num_heads in tensor product attention",
                "omit it, and set attention.key_rank and attention.value_rank",
                ("attention.num_kv_heads=null",),
            )
        if self.query_rank is not None and not self.factorize_query:
            raise self.problem(
                "query_rank",
                "must be null if attention.factorize_query=false",
                "omit it, or set attention.factorize_query=true",
                ("attention.query_rank=null",),
            )
        return self

    @property
    def ranks(self) -> dict[str, int]:
        """The rank R of each factorized tensor, by `query`, `key` and `value`."""
        ranks = {"key": self.key_rank, "value": self.value_rank}
        return {"query": self.query_rank or DEFAULT_QUERY_RANK, **ranks} if self.factorize_query else ranks

    @property
    def head_widths(self) -> dict[str, int]:
        """Columns per head: R head factors, or D features of a query that is not factorized."""
        return {"query": self.head_dim, **self.ranks}

    @property
    def projected_width(self) -> int:
        """Columns of all factors, and of a query that is not factorized."""
        return self.num_heads * sum(self.head_widths.values()) + self.head_dim * sum(self.ranks.values())

    @override
    def initial_weights(self, name: str, full_shape: tuple[int, ...]) -> InitialWeights | None:
        """Return the initialization of the authors' code (repository tensorgi/T6, model/T6{,_kvonly}.py).

        It applies `torch.nn.init.xavier_uniform_` to the weights of factors as tensors of three dimensions,
        [H, N, R] and [H, R, D]. torch takes the first two as fans and multiplies both by the last, so the
        bounds are √(6/((H + N)·R)) and √(6/((H + R)·D)). A query that is not factorized has the bound of a
        matrix, √(6/(H + N·D)); the output projection is 0.
        """
        if self.initialization == "normal":
            return None
        if name == "linear_proj.weight":
            return InitialWeights("normal", 0.0)
        _, kind, tensor = name.rsplit(".", 2)
        num_columns, hidden_size = full_shape
        if tensor not in self.ranks:
            return InitialWeights("uniform", math.sqrt(6 / (hidden_size + num_columns)))
        rank = self.ranks[tensor]
        fan, receptive_field = (self.num_heads, rank) if kind == "heads" else (rank, self.head_dim)
        return InitialWeights("uniform", math.sqrt(6 / ((hidden_size + fan) * receptive_field)))

    @override
    def resolved_fields(self) -> dict[str, Any]:
        return {**super().resolved_fields(), "query_rank": self.ranks.get("query")}
