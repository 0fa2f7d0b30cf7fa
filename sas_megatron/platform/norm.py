"""A norm for machines without TransformerEngine that works under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedNorm:
    """Builds torch's RMSNorm or LayerNorm, its weights marked for Megatron-core's sequence parallelism.

    Under sequence parallelism each tensor rank normalizes its own tokens, so the weights' gradients
    are partial sums; the mark makes Megatron-core add them up. (Its own wrapper of the torch norms
    refuses sequence parallelism, in 0.16.1 and 0.19.2.)
    """

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        normalization: str | None = None,
        **_options: object,
    ) -> torch.nn.Module:
        """The norm itself, of the config's kind or another; this class has no instances."""
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm: torch.nn.Module = norms[normalization or config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
