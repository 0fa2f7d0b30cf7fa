"""The next-token loss of one microbatch, in the form that Megatron-core's schedules call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def token_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Return each token's loss, [B, S] in float32; on all but the last stage, hidden states [S, B, H].

    A stage that is neither the first nor the last needs no tokens: its batch may be empty.
    """
    inputs = map(batch.get, ("tokens", "position_ids", "attention_mask"))
    losses: torch.Tensor = model(*inputs, labels=batch.get("labels"))
    return losses


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, LossFunction]:
    """Run the model on the next microbatch.

    Returns:
        The result of `token_losses`, and a function that sums the losses.
    """
    batch = next(batches)

    def total_loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        # A sum rather than a mean: Megatron-core divides by the tokens of the full step, so the loss does not
        # depend on how samples are divided into microbatches and ranks.
        mask = batch["loss_mask"]
        total = (losses_BS * mask).sum()
        num_tokens = mask.sum().to(torch.int)
        return total, num_tokens, {"loss": torch.stack([total.detach(), num_tokens.to(total.dtype)])}

    return token_losses(model, batch), total_loss
