"""Core attention: scores, softmax, values, and PEAA's mean, on torch's fused or plain products."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from sas_megatron.attention.chunked import attend_chunked, suits_chunks
from sas_megatron.attention.sas.aggregation import average_blocks
from sas_megatron.attention.shared_heads import SharedHeads
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.distributed.context_exchange import ContextExchange


class CoreAttention(MegatronModule):
    """Scaled dot-product attention over this rank's heads, ending in the mean over simulated blocks.

    Without parameters. Megatron-core's local core attention is unfused and refuses a value width
    other than the key's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_args: object,
        attention: AttentionConfig,
        num_blocks: int = 1,
        softmax_scale: float | None = None,
        **_options: object,
    ) -> None:
        super().__init__(config=config)
        self.num_blocks = num_blocks
        self.dropout = attention.dropout
        self.scale = softmax_scale or 1 / math.sqrt(attention.query_key_dim)
        self.attend = _BACKENDS[attention.backend]
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
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attends and averages.

        Args:
            query_SBME: [S, B, M, E], in block-major order.
            key_SBGE: [S', B, G, E]; each head is read by M/G consecutive query heads.
            value_SBGD: [S', B, G, D].
            attention_mask: True where attention is forbidden, [B or 1, 1, S, S']; None: by the type.
            attn_mask_type: `causal` (where no mask is given) or `no_mask`.

        Returns:
            [S, B, M/r·D].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError(
                "the core attention takes neither an additive bias nor packed sequences"
            )
        value_width = value_SBGD.shape[-1]
        shared_blocks = self.num_blocks
        if self.context_exchange is not None:
            shared = SharedHeads.of(
                query_SBME.shape[2],
                key_SBGE.shape[2],
                num_blocks=self.num_blocks,
                ranks=self.context_exchange.num_ranks,
            )
            shared_blocks = shared.num_blocks
            query_SBME, key_SBGE, value_SBGD = self._with_all_tokens(
                query_SBME, key_SBGE, value_SBGD, shared=shared
            )
        causal = attention_mask is None and attn_mask_type != AttnMaskType.no_mask
        dropout = self.dropout if self.training else 0.0
        with self._randomness(dropout):
            context_BMSD = self.attend(
                query_SBME.permute(1, 2, 0, 3),
                key_SBGE.permute(1, 2, 0, 3),
                value_SBGD.permute(1, 2, 0, 3),
                allowed=None if attention_mask is None else attention_mask.logical_not(),
                causal=causal,
                dropout=dropout,
                scale=self.scale,
            )
        # Where this rank has all blocks of its base heads, their mean is taken before anything is sent.
        averaged_SBND = average_blocks(context_BMSD.permute(2, 0, 1, 3), shared_blocks)
        # A padded value is cut back after a mean, when there is less of it.
        averaged_SBND = averaged_SBND[..., :value_width]
        if self.context_exchange is not None:
            averaged_SBND = self.context_exchange.scatter_tokens(averaged_SBND)
        return average_blocks(averaged_SBND, self.num_blocks // shared_blocks).flatten(2)

    def _randomness(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Each tensor rank drops other weights, since it has other heads.

        Under sequence parallelism whole layers run in that state already. Entering it again would draw
        what was drawn before, and recomputation would then drop other weights than the forward pass.
        """
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        forked: contextlib.AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return forked

    def _with_all_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, shared: SharedHeads
    ) -> list[torch.Tensor]:
        """[S/C, B, heads, D] each -> [S, B, a C-th of the heads, D]."""
        assert self.context_exchange is not None
        if shared.copies_keys:
            readers = query.shape[2] // key.shape[2]
            key, value = (heads.repeat_interleave(readers, dim=2) for heads in (key, value))
        exchange = self.context_exchange
        return [exchange.gather_tokens(heads, num_blocks=shared.num_blocks) for heads in (query, key, value)]


def _attend_fused(
    query_BMSE: torch.Tensor,
    key_BGSE: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    allowed: torch.Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Torch's fused attention; where fusing needs equal widths, the value and so the result are padded."""
    # Unequal widths would fall to the unfused path; padded is faster (measured on CPU).
    value_BGSD = F.pad(value_BGSD, (0, query_BMSE.shape[-1] - value_BGSD.shape[-1]))
    return F.scaled_dot_product_attention(
        query_BMSE,
        key_BGSE,
        value_BGSD,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=query_BMSE.shape[1] != key_BGSE.shape[1],
    )


def _attend_by_cudnn(
    query_BMSE: torch.Tensor,
    key_BGSE: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    allowed: torch.Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Torch's fused attention on cuDNN's kernels, at whatever widths; torch says why where it cannot."""
    if key_BGSE.shape[2] == 1:
        # The first token of a text that is generated: cuDNN takes no single key.
        return _attend_fused(
            query_BMSE, key_BGSE, value_BGSD, allowed=allowed, causal=causal, dropout=dropout, scale=scale
        )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(
            query_BMSE,
            key_BGSE,
            value_BGSD,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=query_BMSE.shape[1] != key_BGSE.shape[1],
        )


def _attend_auto(
    query_BMSE: torch.Tensor,
    key_BGSE: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    causal: bool,
    dropout: float,
    scale: float,
    **options: Any,
) -> torch.Tensor:
    """By chunks where that is faster, otherwise fused."""
    if suits_chunks(query_BMSE, key_BGSE, causal=causal, dropout=dropout):
        return attend_chunked(query_BMSE, key_BGSE, value_BGSD, scale=scale)
    return _attend_fused(
        query_BMSE, key_BGSE, value_BGSD, causal=causal, dropout=dropout, scale=scale, **options
    )


def _attend_unfused(
    query_BMSE: torch.Tensor,
    key_BGSE: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    allowed: torch.Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Plain products, which torch's FLOP counter sees; softmax in at least float32."""
    readers = query_BMSE.shape[1] // key_BGSE.shape[1]
    key, value = (heads.repeat_interleave(readers, dim=1) for heads in (key_BGSE, value_BGSD))
    scores = (query_BMSE * scale) @ key.transpose(-2, -1)
    if causal:
        rows, columns = scores.shape[-2:]
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return F.dropout(weights, dropout) @ value


_BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "auto": _attend_auto,
    "fused": _attend_fused,
    "unfused": _attend_unfused,
    "cudnn": _attend_by_cudnn,
}


def check_backend(attention: AttentionConfig) -> None:
    """Before a layer is built, since Megatron-core turns what that raises into another error.

    Raises:
        FieldError: `attention.backend` cannot run here.
    """
    if attention.backend == "cudnn" and not torch.cuda.is_available():
        raise FieldError("attention.backend", "cudnn", "needs a CUDA device", "use auto")


def build_self_attention_spec(
    variant: AttentionConfig,
    /,
    *,
    module: type[SelfAttention],
    num_blocks: int = 1,
    linear_qkv: Callable[..., Any] = ColumnParallelLinear,
    **module_options: object,
) -> ModuleSpec:
    """A `ModuleSpec` of self-attention on Megatron-core's parallel linears and our core attention.

    Args:
        variant: The attention's config.
        module: Megatron-core's `SelfAttention` or a subclass.
        num_blocks: r, the simulated copies that PEAA averages.
        linear_qkv: Builds what the queries, keys and values are made from, given the arguments of a
            `ColumnParallelLinear`; another one needs a `module` that reads it.
        module_options: Further arguments for `module`.

    Raises:
        FieldError: the back end cannot run here.
    """
    check_backend(variant)
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": AttnMaskType.causal, **module_options},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=functools.partial(CoreAttention, attention=variant, num_blocks=num_blocks),
            linear_proj=RowParallelLinear,
        ),
    )
