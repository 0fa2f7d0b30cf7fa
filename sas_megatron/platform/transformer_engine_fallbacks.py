"""Replacements for parts of TransformerEngine that Megatron-core uses: norms and the fused rotary kernel.

The norms are always used; the functions below them change Megatron-core only if TransformerEngine is absent.
Importing this module must not import Megatron-core: on CPU, `platform.cpu.install` has to run first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedNorm:
    """Builds torch's RMSNorm or LayerNorm with weights marked for Megatron-core's sequence parallelism.

    Under sequence parallelism each tensor rank normalizes only its local tokens, so the gradients of the
    replicated weights are partial sums. The mark makes Megatron-core sum them. (Megatron-core's own wrapper
    of the torch norms rejects sequence parallelism, in 0.16.1 and 0.19.2.)
    """

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        normalization: str | None = None,
        **_options: object,
    ) -> torch.nn.Module:
        """Return the torch module, not an instance of this class; `normalization` overrides the config."""
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm: torch.nn.Module = norms[normalization or config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class _ApplyRope(torch.autograd.Function):
    """Rotate the feature pairs (i, i + R/2) in forward, and by the negative angles in backward.

    Megatron-core's unfused form makes six intermediate tensors of the query's size in forward and again in
    backward. On CPU that is a sixth of the time of a SAS block. This form makes one.
    """

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(heads, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(gradient, cosine, -sine), None, None


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = cosine.shape[-1]
    rotated = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    torch.mul(first, cosine, out=rotated[..., :half])
    rotated[..., :half].addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=rotated[..., half : 2 * half])
    rotated[..., half : 2 * half].addcmul_(first, sine)
    rotated[..., 2 * half :] = heads[..., 2 * half :]
    return rotated


def apply_rope(heads: torch.Tensor, angles: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Apply rotary embeddings to the first R features, with the signature of Megatron-core's fused kernel.

    Args:
        heads: [S, B, heads, D].
        angles: [S, 1, 1, R] with R ≤ D, in float32; its two halves are equal.
        interleaved: Pair neighbouring features instead of the two halves.

    Raises:
        NotImplementedError: `interleaved` is set, which only TransformerEngine supports.
    """
    if interleaved:
        raise NotImplementedError("interleaved rotary pairs need TransformerEngine; install it")
    half = angles[..., : angles.shape[-1] // 2]
    rotated: torch.Tensor = _ApplyRope.apply(heads, half.cos().to(heads.dtype), half.sin().to(heads.dtype))
    return rotated


def install_fused_rope() -> None:
    """Make `apply_rope` the kernel of Megatron-core's `apply_rope_fusion` unless there is one already."""
    from megatron.core.models.common.embeddings import rope_utils

    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = apply_rope


def allow_mla_without_transformer_engine() -> None:
    """Let `MultiLatentAttention` be built without TransformerEngine; do nothing if it is installed.

    Megatron-core 0.16.1 concludes that TransformerEngine is installed because its own wrapper module can be
    imported. Without TransformerEngine the wrappers are mocks, and `isinstance` with one raises a TypeError.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE
