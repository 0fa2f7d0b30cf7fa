"""Scaled-dot-product attention over the heads of one rank, by the implementation that a config selects.

    a mask tensor (decoding), or neither segments nor a window   one call
    segments or a window, on a GPU in half precision             torch's variable-length attention
    otherwise                                                    each segment by itself, and within a window
                                                                 each block of queries with its keys

No tensor has a row and a column for each token of a sample, unless `attention.backend=unfused` asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sas_megatron.attention.chunked import attend_chunked, supports_chunks
from sas_megatron.costs.attention_backend import uses_varlen, window_blocks
from sas_megatron.data.segments import Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None  # type: ignore[assignment]


class AttentionBackend:
    """Computes softmax(scale·QKᵀ)·V over the heads of one rank, as `attention.backend` selects.

    Args:
        name: One of the choices of `attention.backend`.
        scale: Factor of the scores.
    """

    def __init__(self, name: Literal["auto", "fused", "unfused", "cudnn"], *, scale: float) -> None:
        self.name, self.scale = name, scale

    def attend(
        self,
        query_BMSE: torch.Tensor,
        key_BGSE: torch.Tensor,
        value_BGSD: torch.Tensor,
        *,
        allowed: torch.Tensor | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        segments: Segments | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Return [B, M, S, D]; if the backend pads the value, [B, M, S, E] with zeros at the end.

        Args:
            query_BMSE: Queries.
            key_BGSE: Keys; each head is read by M/G consecutive query heads.
            value_BGSD: Values.
            allowed: Boolean mask, True where attention is allowed; None for no mask tensor.
            causal: Whether to apply the causal mask.
            dropout: Probability of dropping an attention weight.
            segments: With the causal mask, the segments that attend only to themselves; None for one segment
                per sample.
            window: With the causal mask, the number of keys that a query attends to, the last of which is its
                own; None for all.
        """
        if not causal:
            return self._attend_once(query_BMSE, key_BGSE, value_BGSD, mask=allowed, dropout=dropout)
        if segments is not None and segments.are_whole_samples:
            segments = None
        longest = key_BGSE.shape[2] if segments is None else segments.longest
        window = None if window is None or window >= longest else window
        heads = (query_BMSE, key_BGSE, value_BGSD)
        if segments is None and window is None:
            return self._attend_causally(*heads, dropout=dropout)
        if self._uses_varlen(query_BMSE, dropout=dropout):
            return self._attend_varlen(*heads, segments=segments, window=window)
        if segments is None:
            return self._attend_in_window(*heads, window=window, dropout=dropout)
        return self._attend_by_segment(*heads, segments=segments, window=window, dropout=dropout)

    def _attend_by_segment(
        self,
        *heads: torch.Tensor,
        segments: Segments,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor:
        """Return [B, M, S, D], stored as [S, B, M, D], which the next operation reads."""
        width = heads[2].shape[-1]
        samples = []
        # The gradient of a split is one concatenation; that of each slice would be as large as the sample.
        for lengths, *of_sample in zip(segments.lengths, *(part.split(1) for part in heads), strict=True):
            parts = [
                self._attend_in_window(*of_segment, window=window, dropout=dropout)[..., :width]
                for of_segment in zip(*(part.split(lengths, dim=2) for part in of_sample), strict=True)
            ]
            samples.append(torch.cat([part.permute(2, 0, 1, 3) for part in parts]))
        context_SBMD = samples[0] if len(samples) == 1 else torch.cat(samples, dim=1)
        return context_SBMD.permute(1, 2, 0, 3)

    def _attend_in_window(
        self,
        query_BMSE: torch.Tensor,
        key_BGSE: torch.Tensor,
        value_BGSD: torch.Tensor,
        *,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor:
        """Return the causal attention of one segment within a window."""
        length = query_BMSE.shape[2]
        if window is None or window >= length:
            return self._attend_causally(query_BMSE, key_BGSE, value_BGSD, dropout=dropout)
        if self.name == "unfused":
            return self._attend_unfused(
                query_BMSE,
                key_BGSE,
                value_BGSD,
                allowed=window_mask(length, length, window=window, device=query_BMSE.device),
                dropout=dropout,
            )
        if self._uses_chunks(query_BMSE, key_BGSE, window=window, dropout=dropout):
            return attend_chunked(query_BMSE, key_BGSE, value_BGSD, scale=self.scale, window=window)
        value_BGSD = self._pad_value(query_BMSE, value_BGSD)
        sizes = window_blocks(length, window)
        rows = max(sizes)
        allowed = window_mask(rows, rows + window - 1, window=window, device=query_BMSE.device)
        # A mask that is added can be shared by all blocks; torch would convert a boolean one for each.
        bias = torch.zeros_like(allowed, dtype=query_BMSE.dtype).masked_fill(~allowed, float("-inf"))
        results: list[torch.Tensor] = []
        before: list[torch.Tensor] | None = None
        for query, *block in zip(
            *(part.split(sizes, dim=2) for part in (query_BMSE, key_BGSE, value_BGSD)), strict=True
        ):
            key, value = block
            num_before = 0 if before is None else window - 1
            if before is not None:
                key, value = (
                    torch.cat([earlier[:, :, earlier.shape[2] - num_before :], part], dim=2)
                    for earlier, part in zip(before, block, strict=True)
                )
            of_block = bias[: query.shape[2], window - 1 - num_before : window - 1 + query.shape[2]]
            results.append(self._attend_once(query, key, value, mask=of_block, dropout=dropout))
            before = block
        return torch.cat(results, dim=2)

    def _attend_causally(
        self, query_BMSE: torch.Tensor, key_BGSE: torch.Tensor, value_BGSD: torch.Tensor, *, dropout: float
    ) -> torch.Tensor:
        if self._uses_chunks(query_BMSE, key_BGSE, window=None, dropout=dropout):
            return attend_chunked(query_BMSE, key_BGSE, value_BGSD, scale=self.scale)
        return self._attend_once(query_BMSE, key_BGSE, value_BGSD, causal=True, dropout=dropout)

    def _attend_once(
        self,
        query_BMSE: torch.Tensor,
        key_BGSE: torch.Tensor,
        value_BGSD: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        dropout: float,
    ) -> torch.Tensor:
        """Attend in one call, with a boolean mask or one that is added to the scores, or the causal mask."""
        if self.name == "unfused":
            if causal:
                rows, columns = query_BMSE.shape[2], key_BGSE.shape[2]
                mask = window_mask(rows, columns, window=None, device=query_BMSE.device)
            return self._attend_unfused(query_BMSE, key_BGSE, value_BGSD, allowed=mask, dropout=dropout)
        # cuDNN does not support a single key, as the first token of a generated text has.
        if self.name == "cudnn" and key_BGSE.shape[2] > 1:
            kernel: contextlib.AbstractContextManager[None] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        else:
            kernel = contextlib.nullcontext()
            value_BGSD = self._pad_value(query_BMSE, value_BGSD)
        with kernel:
            return F.scaled_dot_product_attention(
                query_BMSE,
                key_BGSE,
                value_BGSD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=query_BMSE.shape[1] != key_BGSE.shape[1],
            )

    def _pad_value(self, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Pad values to the width of the queries: torch runs unequal widths unfused (measured on a CPU)."""
        return F.pad(value, (0, query.shape[-1] - value.shape[-1]))

    def _attend_unfused(
        self,
        query_BMSE: torch.Tensor,
        key_BGSE: torch.Tensor,
        value_BGSD: torch.Tensor,
        *,
        allowed: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """Compute separate matrix products, which torch's FLOP counter sees; softmax in at least float32."""
        readers = query_BMSE.shape[1] // key_BGSE.shape[1]
        key, value = (heads.repeat_interleave(readers, dim=1) for heads in (key_BGSE, value_BGSD))
        scores = (query_BMSE * self.scale) @ key.transpose(-2, -1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return F.dropout(weights.to(scores.dtype), dropout) @ value

    def _attend_varlen(
        self,
        query_BMSE: torch.Tensor,
        key_BGSE: torch.Tensor,
        value_BGSD: torch.Tensor,
        *,
        segments: Segments | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend to all segments in one call of torch's variable-length attention.

        Its kernel needs equal widths of keys and values, which are a multiple of 8.
        """
        batch, _, length, width = query_BMSE.shape
        padded = -(-width // 8) * 8
        query_TME, key_TGE, value_TGE = (
            F.pad(heads, (0, padded - heads.shape[-1])).permute(0, 2, 1, 3).flatten(0, 1)
            for heads in (query_BMSE, key_BGSE, value_BGSD)
        )
        if segments is None:
            ends = torch.arange(batch + 1, dtype=torch.int32, device=query_BMSE.device) * length
            longest = length
        else:
            ends, longest = segments.cu_seqlens_q, segments.longest
        context_TME = varlen_attn(
            query_TME,
            key_TGE,
            value_TGE,
            ends,
            ends,
            longest,
            longest,
            scale=self.scale,
            # Keys before a query's own, and after it.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query_BMSE.shape[1] != key_BGSE.shape[1],
        )
        assert isinstance(context_TME, torch.Tensor), "no auxiliary results are requested"
        context_BSME: torch.Tensor = context_TME[..., :width].unflatten(0, (batch, length))
        return context_BSME.permute(0, 2, 1, 3)

    def _uses_chunks(
        self, query_BMSE: torch.Tensor, key_BGSE: torch.Tensor, *, window: int | None, dropout: float
    ) -> bool:
        return self.name == "auto" and supports_chunks(query_BMSE, key_BGSE, window=window, dropout=dropout)

    def _uses_varlen(self, query: torch.Tensor, *, dropout: float) -> bool:
        """Whether torch's variable-length attention supports these queries on their device."""
        return _varlen_fits(query.device) and uses_varlen(
            backend=self.name,
            is_half=query.dtype in (torch.bfloat16, torch.float16),
            dropout=dropout,
            width=query.shape[-1],
        )


@functools.cache
def _varlen_fits(device: torch.device) -> bool:
    """Return whether torch has windows and grouped keys, and the GPU compute capability 8 or more."""
    options: Any = {} if varlen_attn is None else inspect.signature(varlen_attn).parameters
    if device.type != "cuda" or not {"window_size", "enable_gqa"} <= set(options):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def window_mask(rows: int, columns: int, *, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which of `columns` keys the last `rows` queries attend to, a boolean [rows, columns].

    Args:
        rows: Number of queries.
        columns: Number of keys; the last one is that of the last query.
        window: Number of keys that a query attends to; None for all up to its own.
        device: Device of the mask.
    """
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    return allowed if window is None else allowed.triu(columns - rows - window + 1)
