"""Sums of partial gradients: one exact all-reduce in float32 for any dtype of the weights."""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout


def _summed(dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    from sas_megatron.distributed.communication_counter import CommunicationCounter
    from sas_megatron.distributed.gradient_sums import sum_gradients_over

    group = in_layout(ParallelConfig(tensor=2)).tensor_group
    first = torch.arange(6.0).view(2, 3).to(dtype).requires_grad_()
    second = torch.full((5,), 0.5, dtype=dtype, requires_grad=True)
    unused = torch.ones(7, dtype=dtype, requires_grad=True)
    with CommunicationCounter({"tensor": group}) as counter:
        same = sum_gradients_over(group, [first, second, unused])
        assert all(torch.equal(a, b) for a, b in zip(same, (first, second, unused), strict=True))
        # The gradient of the first weight is 256 on rank 0 and 1 on rank 1. In bfloat16 their sum is 256.
        scale = (256.0, 1.0)[group.rank()]
        (scale * same[0].float().sum() + (group.rank() + 1) * same[1].float().sum()).backward()
    gradients = [first.grad, second.grad, unused.grad]
    assert all(gradient is not None and gradient.dtype == dtype for gradient in gradients)
    return gradients, counter.as_dict()


def test_partial_gradients_are_summed_in_one_all_reduce(ranks: Any) -> None:
    for gradients, sent in ranks(2).run(_summed, torch.float32):
        assert torch.equal(gradients[0], torch.full((2, 3), 257.0))
        assert torch.equal(gradients[1], torch.full((5,), 3.0))
        assert not gradients[2].any()
        # 2·(P-1)/P float32 elements for each parameter.
        assert sent == {"tensor": {"allreduce": (6 + 5 + 7) * 4}}


def test_half_precision_gradients_are_sent_in_float32(ranks: Any) -> None:
    for gradients, sent in ranks(2).run(_summed, torch.bfloat16):
        assert torch.equal(gradients[1], torch.full((5,), 3.0, dtype=torch.bfloat16))
        assert sent == {"tensor": {"allreduce": (6 + 5 + 7) * 4}}


def _sum_without_communication() -> tuple[int, int]:
    from sas_megatron.distributed.gradient_sums import sum_gradients_over

    topology = in_layout(ParallelConfig(tensor=2))
    weight = torch.ones(3, requires_grad=True)
    (unchanged,) = sum_gradients_over(topology.data_group, [weight])
    assert topology.data_group.size() == 1
    assert unchanged is weight
    return len(sum_gradients_over(topology.tensor_group, [])), len(
        sum_gradients_over(topology.data_group, [])
    )


def test_no_weights_or_a_group_of_one_rank_need_no_sum(ranks: Any) -> None:
    assert ranks(2).run(_sum_without_communication) == [(0, 0), (0, 0)]
