"""Core attention: scores, softmax, the product with values, and for SAS the aggregation of blocks."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from sas_megatron.attention.backend import AttentionBackend
from sas_megatron.attention.modifiers import AttentionModifiers
from sas_megatron.attention.sas.simulated_attention import aggregate_blocks
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.costs.head_sharding import AttendedHeads, HeadSharding, count_local_heads
from sas_megatron.data.segments import Segments
from sas_megatron.distributed.context_exchange import ContextExchange


class CoreAttention(MegatronModule):
    """Scaled dot-product attention over this rank's heads, and the aggregation of blocks of simulated heads.

    Its only parameters are those of the attention's modifiers, which the layer applies before and after it
    (`AttentionLayer.forward`). They are here since every variant builds its core attention from the config.

    Megatron-core's local core attention is unfused, and requires values to be as wide as keys.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_args: object,
        attention: AttentionConfig,
        layer_number: int = 1,
        num_blocks: int = 1,
        aggregation: str = "mean",
        softmax_scale: float | None = None,
        **_options: object,
    ) -> None:
        super().__init__(config=config)
        self.window = attention.window_of_layer(layer_number)
        self.num_blocks, self.aggregation = num_blocks, aggregation
        self.dropout = attention.dropout
        scale = softmax_scale or 1 / math.sqrt(attention.query_key_dim)
        self.backend = AttentionBackend(attention.backend, scale=scale)
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.modifiers = AttentionModifiers(attention, config, group=tensor_group)
        group = parallel_state.get_context_parallel_group()
        self.context_exchange = ContextExchange(group) if group.size() > 1 else None

    def forward(
        self,
        query_SBME: torch.Tensor,
        key_SBGE: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: Segments | None = None,
        **_options: object,
    ) -> torch.Tensor:
        """Attend, and aggregate the blocks.

        Without a mask tensor, queries attend to the keys of their segment, and of this layer's window.

        Args:
            query_SBME: [S, B, M, E], in block-major order.
            key_SBGE: [T, B, G, E]; each head is read by M/G consecutive query heads.
            value_SBGD: [T, B, G, D].
            attention_mask: True where attention is forbidden, [B or 1, 1, S, T]; None: see `attn_mask_type`.
            attn_mask_type: The type of mask without a mask tensor: `causal` or `no_mask`.
            packed_seq_params: The segments of the samples, over all context ranks; None for one per sample.

        Returns:
            [S, B, M/r·D].
        """
        value_width = value_SBGD.shape[-1]
        sharded_blocks = self.num_blocks
        if self.context_exchange is not None:
            heads = AttendedHeads(
                query_SBME.shape[2], key_SBGE.shape[2], key_SBGE.shape[3], value_SBGD.shape[3]
            )
            sharding = HeadSharding.select(
                heads, num_blocks=self.num_blocks, ranks=self.context_exchange.num_ranks
            )
            sharded_blocks = sharding.num_blocks
            query_SBME, key_SBGE, value_SBGD = self._gather_tokens(
                query_SBME, key_SBGE, value_SBGD, sharding=sharding
            )
        dropout = self.dropout if self.training else 0.0
        with self._dropout_randomness(dropout):
            context_BMSD = self.backend.attend(
                query_SBME.permute(1, 2, 0, 3),
                key_SBGE.permute(1, 2, 0, 3),
                value_SBGD.permute(1, 2, 0, 3),
                allowed=None if attention_mask is None else attention_mask.logical_not(),
                causal=attention_mask is None and attn_mask_type != AttnMaskType.no_mask,
                dropout=dropout,
                segments=packed_seq_params,
                window=self.window,
            )
        # A rank that has all blocks of its base heads aggregates them before it sends anything.
        aggregated_SBND = self._aggregate(context_BMSD.permute(2, 0, 1, 3), sharded_blocks)
        # Padding of the value is removed after the aggregation, when the tensor is smaller.
        aggregated_SBND = aggregated_SBND[..., :value_width]
        if self.context_exchange is not None:
            aggregated_SBND = self.context_exchange.scatter_tokens(aggregated_SBND)
        return self._aggregate(aggregated_SBND, self.num_blocks // sharded_blocks).flatten(2)

    def _aggregate(self, context_SBMD: torch.Tensor, num_blocks: int) -> torch.Tensor:
        return aggregate_blocks(context_SBMD, num_blocks, aggregation=self.aggregation)

    def _dropout_randomness(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Return a context in which each tensor rank draws different dropout masks, since its heads differ.

        Under sequence parallelism, the entire layer already runs in this context. Entering it again would
        draw the same numbers again, and recomputation would then draw a mask that differs from the forward
        pass.
        """
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        forked: contextlib.AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return forked

    def _gather_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, sharding: HeadSharding
    ) -> list[torch.Tensor]:
        """Exchange [S/C, B, heads, D] for [S, B, heads/C, D]."""
        assert self.context_exchange is not None, "only context ranks exchange tokens"
        if sharding.key_copies > 1:
            key, value = (heads.repeat_interleave(sharding.key_copies, dim=2) for heads in (key, value))
        exchange = self.context_exchange
        return [
            exchange.gather_tokens(heads, num_blocks=sharding.num_blocks) for heads in (query, key, value)
        ]


def check_backend(attention: AttentionConfig) -> None:
    """Check that `attention.backend` can run, before Megatron-core builds the layer and replaces the error.

    Raises:
        FieldError: It cannot run on this machine.
    """
    if attention.backend != "cudnn":
        return
    if not torch.cuda.is_available():
        raise FieldError("attention.backend", "cudnn", "needs a CUDA device", "use auto")
    if (reason := _why_cudnn_cannot_run(attention)) is not None:
        version = torch.backends.cudnn.version()
        raise FieldError(
            "attention.backend",
            "cudnn",
            f"cannot run with cuDNN {version} on {torch.cuda.get_device_name()}: {reason}",
            "use auto",
        )


def _why_cudnn_cannot_run(attention: AttentionConfig) -> str | None:
    """Return torch's reason, or None if cuDNN's attention can train with these heads on the current GPU."""
    queries, keys = count_local_heads(attention, tensor=1)
    query, key, value = (
        torch.empty(1, heads, 128, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads, width in (
            (queries, attention.query_key_dim),
            (keys, attention.query_key_dim),
            (keys, attention.value_width),
        )
    )
    parameters = SDPAParams(query, key, value, None, attention.dropout, True, queries != keys)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if can_use_cudnn_attention(parameters, debug=True):
            return None
    return "; ".join(str(warning.message) for warning in caught) or "torch gives no reason"


def build_self_attention_spec(
    attention: AttentionConfig,
    /,
    *,
    module: type[SelfAttention],
    aggregation: str = "mean",
    linear_qkv: Callable[..., Any] = ColumnParallelLinear,
    **module_options: object,
) -> ModuleSpec:
    """Build the spec of self-attention with Megatron-core's parallel linear layers and our core attention.

    Args:
        attention: The attention's config.
        module: Megatron-core's `SelfAttention` or a subclass.
        aggregation: How blocks of simulated heads are aggregated, `mean` or `rsqrt` (`aggregate_blocks`).
        linear_qkv: Builds the projection of hidden states, given the arguments of a `ColumnParallelLinear`;
            a different projection needs a `module` that reads it.
        module_options: Further arguments of `module`.

    Raises:
        FieldError: The configured backend cannot run on this machine.
    """
    check_backend(attention)
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": AttnMaskType.causal, **module_options},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=functools.partial(
                CoreAttention,
                attention=attention,
                num_blocks=attention.num_blocks,
                aggregation=aggregation,
            ),
            linear_proj=RowParallelLinear,
        ),
    )
