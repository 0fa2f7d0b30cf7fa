"""The loss of differential attention with all modifiers differs between layouts by rounding alone.

In float32 its loss after five steps differs by 1e-5 between layouts, more than that of other attentions. In
float64 the difference is smaller by the ratio of the precisions: every operation, sum over ranks and update
is the same, and the model amplifies rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.rank_pool import in_layout
from tests.selection import cases
from tests.training.layouts import Layout
from tests.training.training_runs import NUM_STEPS, batches_of_step

ATTENTION = {**small.DIFF_GROUPED, **small.MODIFIERS}


def losses_in(dtype: torch.dtype, config: RunConfig) -> list[float]:
    """Train on a rank in `dtype`, which engines do not support for float64; return the loss of each step."""
    from megatron.core import parallel_state

    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.language_loss import forward_step

    topology = in_layout(config.parallel)
    (model,) = build_gpt_chunks(config, dtype=dtype)
    group = parallel_state.get_tensor_model_parallel_group()
    parameters = list(model.parameters())
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [x for x in parameters if x.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [x for x in parameters if x.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        total, count = torch.zeros((), dtype=dtype), 0.0
        batches = batches_of_step(config, topology, step)
        for _ in range(config.training.num_microbatches(topology.data_size)):
            outputs, total_loss = forward_step(batches, model)
            loss, tokens, _ = total_loss(outputs)
            total, count = total + loss, count + float(tokens)
        (total / count).backward()
        losses.append(float(total.detach() / count))
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in parameters:
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=group)
            if getattr(parameter, "tensor_model_parallel", False) or group.rank() == 0:
                squares += parameter.grad.double().square().sum()
        dist.all_reduce(squares, group=group)
        clipping = min(1.0, settings.clip_gradient_norm / float(squares.sqrt()))
        for parameter in parameters:
            parameter.grad.mul_(clipping)
        for parameters_group in optimizer.param_groups:
            warmup = min(1.0, (step + 1) / config.schedule.warmup_steps)
            parameters_group["lr"] = warmup * settings.learning_rate
        optimizer.step()
    return losses


def largest_difference(losses: list[float], expected: list[float]) -> float:
    return max(abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True))


@pytest.mark.parametrize("sequence", cases((False, True), default=(False,)))
def test_differences_between_layouts_are_rounding(ranks: Any, sequence: bool) -> None:
    alone, sharded = (
        Layout(4, parallel).config_of(ATTENTION) for parallel in ({}, {"tensor": 4, "sequence": sequence})
    )
    by_dtype = {}
    for dtype in (torch.float32, torch.float64):
        [expected] = ranks(1).run(losses_in, dtype, alone)
        losses = ranks(4).run(losses_in, dtype, sharded)
        assert all(of_rank == losses[0] for of_rank in losses)
        by_dtype[dtype] = expected, losses[0]
    print(
        {dtype: [largest_difference(*pair)] for dtype, pair in by_dtype.items()},
        largest_difference(by_dtype[torch.float32][0], by_dtype[torch.float64][0]),
        largest_difference(by_dtype[torch.float32][1], by_dtype[torch.float64][0]),
        by_dtype,
    )
    assert largest_difference(*by_dtype[torch.float64]) < 1e-12
