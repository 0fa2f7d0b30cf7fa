"""The norm of all gradients, clipping and scaling, without reading values of single tensors to the host.

Megatron-core 0.16.1 without TransformerEngine and Apex reads one value per parameter for the norm, and one
per model chunk for the number of tokens. A read waits until the device has finished everything before it.
Here all tensors are reduced in one call, and the norm stays on the device until the step reads its totals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

# Added to the norm before the division, as in Megatron-core (`clip_grads.py`) and in torch.
EPSILON = 1e-6


@torch.no_grad()
def compute_gradient_norm(optimizers: Sequence[Any]) -> torch.Tensor:
    """Return the norm of the gradients over all ranks, a float32 scalar on their device; equal on all ranks.

    Each parameter counts once: Megatron-core's optimizers leave out shared parameters and replicas.

    Args:
        optimizers: Megatron-core's optimizers of this rank, of which `prepare_grads` has been called.
    """
    gradients: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
    for optimizer in optimizers:
        gradients.setdefault(optimizer.get_grad_stats_parallel_group(), []).extend(_counted(optimizer))
    squares = []
    for group, tensors in gradients.items():
        square = torch.zeros((), device=torch.cuda.current_device())
        if tensors:
            square = torch.stack(torch._foreach_norm(tensors)).norm().square()
        dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _counted(optimizer: Any) -> list[torch.Tensor]:
    """Return the gradients that the norm counts."""
    # Its name up to and from megatron-core 0.19 on.
    name = "get_main_grads_for_grad_norm"
    found = getattr(optimizer, name if hasattr(optimizer, name) else "get_grads_for_grad_norm")
    gradients: list[torch.Tensor] = found()
    return gradients


@torch.no_grad()
def clip_gradients(optimizers: Sequence[Any], *, max_norm: float, gradient_norm: float) -> None:
    """Multiply all gradients by max_norm / (norm + EPSILON) in place if that is below 1."""
    factor = max_norm / (gradient_norm + EPSILON)
    parameters = [parameter for optimizer in optimizers for parameter in optimizer.get_parameters()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor < 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def finalize_gradients(model_chunks: list[Any], num_tokens: torch.Tensor, **options: Any) -> None:
    """Reduce the gradients over the ranks and divide them by the number of tokens, as Megatron-core does.

    Args:
        model_chunks: The wrapped model chunks of this rank.
        num_tokens: Tokens of this rank's microbatches, an int32 scalar; only the last stage's is read.
        options: Those of Megatron-core's `finalize_model_grads`.
    """
    finalize_model_grads(model_chunks, None, **options)
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    last_rank = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(num_tokens, src=last_rank, group=pipeline_group)
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # Without tokens all gradients are zero.
    scaling = 1.0 / num_tokens.clamp(min=1)
    for chunk in model_chunks:
        chunk.scale_gradients(scaling)
